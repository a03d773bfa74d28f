"""Recommenders without a model, learnt online from the same sessions: what OneRec must beat."""

from trainer.baselines.covisitation import CoVisitation
from trainer.baselines.popularity import Popularity

__all__ = ["CoVisitation", "Popularity"]
