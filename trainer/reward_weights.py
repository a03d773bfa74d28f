"""How four towers become one reward R(u, S); numpy only, so that serving needs no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onerec.errors import UserError
from trainer.config import RewardConfig

TARGETS = ("swt", "vtr", "wtr", "ltr")
"""The towers in the order of every last axis: watch time, effective views, follow, like of a window (SEMANTICS.md §6)."""


def tower_weights(config: RewardConfig) -> NDArray[np.float32]:
    """Share of each tower in R, fp32 [4], sum 1. Raises UserError where every weight is 0."""
    weights = np.array([getattr(config, target) for target in TARGETS], np.float64)
    if not weights.sum() > 0:
        raise UserError("reward.swt, reward.vtr, reward.wtr and reward.ltr are all 0; give at least one tower a weight")
    return (weights / weights.sum()).astype(np.float32)


def combine_array(rewards: NDArray[np.floating], config: RewardConfig) -> NDArray[np.float32]:
    """R(u, S), the weighted mean of the towers: `rewards [..., 4]` in the order of TARGETS -> fp32 `[...]`."""
    return (rewards.astype(np.float32) * tower_weights(config)).sum(-1, dtype=np.float32)
