"""The Triton model `recommend`: what runs inside the Python backend."""
