"""Events in, histories and sessions out (SEMANTICS.md)."""
