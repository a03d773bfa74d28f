"""What OneRec must beat: counts learnt online (popularity, co-visitation) and the item transformers of the paper's table."""

from trainer.baselines.covisitation import CoVisitation, CoVisitationRanker
from trainer.baselines.popularity import Popularity, PopularityRanker

__all__ = ["CoVisitation", "CoVisitationRanker", "Popularity", "PopularityRanker"]
