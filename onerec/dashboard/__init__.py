"""`onerec dashboard`: one read-only page that shows how old the served knowledge is, and what is known beside it."""
