"""Checkpoint to bundle to Triton, and the client that asks it."""
