"""A small world of users and videos."""
