"""Catalogue, semantic IDs, model and the continuous trainer."""
