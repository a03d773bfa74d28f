"""Windows, judged sessions and preference pairs as tensors, as the models learn them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trainer.data import Example, Judged, reward_arrays, to_arrays
from trainer.model import Batch
from trainer.pairs import Pair
from trainer.preference import PreferenceBatch
from trainer.reward import RewardBatch


def window_batch(
    examples: Sequence[Example], item_codes: np.ndarray, *, m: int, device: torch.device | str = "cpu"
) -> Batch:
    """Windows of at most `m` target items, on a device."""
    return Batch(*(torch.from_numpy(array).to(device) for array in to_arrays(list(examples), item_codes, m=m)))


def judged_batch(
    sessions: Sequence[Judged], item_codes: np.ndarray, device: torch.device | str = "cpu"
) -> RewardBatch:
    """Sessions for the reward model, on a device."""
    return RewardBatch(*(torch.from_numpy(array).to(device) for array in reward_arrays(sessions, item_codes)))


def pair_batch(pairs: Sequence[Pair], device: torch.device | str = "cpu") -> PreferenceBatch:
    """`pairs`, which have the same number of losers, with their histories right-padded, on a device."""
    longest = max(1, max(len(pair.history) for pair in pairs))
    chosen = torch.tensor([pair.chosen for pair in pairs], dtype=torch.int64)
    history = torch.zeros((len(pairs), longest, chosen.shape[-1]), dtype=torch.int64)
    mask = torch.zeros((len(pairs), longest), dtype=torch.bool)
    for row, pair in enumerate(pairs):
        if pair.history:
            history[row, : len(pair.history)] = torch.tensor(pair.history)
        mask[row, : len(pair.history)] = True
    batch = PreferenceBatch(
        history,
        mask,
        chosen,
        torch.tensor([pair.rejected for pair in pairs], dtype=torch.int64),
        torch.tensor([pair.chosen_log_prob for pair in pairs]),
        torch.tensor([pair.rejected_log_probs for pair in pairs]),
    )
    return PreferenceBatch(*(tensor.to(device) for tensor in batch))
