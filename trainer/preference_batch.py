"""Preference pairs as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.pairs import Pair
from trainer.preference import PreferenceBatch


def to_batch(pairs: Sequence[Pair], device: torch.device | str = "cpu") -> PreferenceBatch:
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
