"""The sub-commands of `onerec`, one module an area."""
