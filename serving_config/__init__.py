"""Templates of the Triton model repository."""
