"""Monitoring: how old knowledge is at every hand-off, what else operators want to know, and how it is told (Prometheus)."""
