"""One run learnt by several ranks: rank 0 decides, all do it, each on the sessions of its users' partitions.

What all must agree on (where a batch ends, which items are known, which pairs are used, when a checkpoint is due) is
decided by rank 0 and told to the others; losses are means over the global batch, so that a step is that of one process
up to rounding, whatever the number of ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.data import Example
from trainer.journal import Entry
from trainer.model import Batch, OneRec
from trainer.optim import Parts
from trainer.pairs import Pair
from trainer.ranks import Ranks

PARTITIONS = 1024
"""Users are spread over so many partitions, and these over the ranks in turn."""


def owns(ranks: Ranks, session_id: str) -> bool:
    """Whether this rank learns the sessions of that session's user, who is the first part of its id (SEMANTICS.md §5)."""
    user = session_id.partition(":")[0]
    return zlib.crc32(user.encode()) % PARTITIONS % ranks.size == ranks.rank


def share(ranks: Ranks, examples: Sequence[Example]) -> list[Example]:
    """Those of a batch's `examples` that this rank learns; over all ranks each exactly once."""
    return [example for example in examples if owns(ranks, example.session_id)]


class Told(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What rank 0 has decided about the next step; the other ranks do it and nothing else."""


class Wait(Told, frozen=True, kw_only=True):
    """Nothing to learn yet; said now and then, so that nobody takes an idle leader for a dead one."""


class Save(Told, frozen=True, kw_only=True):
    """A checkpoint is due: `Optimizer.state_dict()`, which all ranks give together."""


class End(Told, frozen=True, kw_only=True):
    """The run ends here."""


class Learn(Told, frozen=True, kw_only=True):
    """Learn batch `step`: `entry` is the journal's of it, `cursor` (round, sequence) where it must end.

    `known`: rows of the catalogue that must be known then; `pairs`: the preference pairs of the step.
    """

    step: int
    entry: Entry
    cursor: tuple[int, int]
    known: int
    pairs: tuple[Pair, ...] = ()


Order = Wait | Save | End | Learn


class FollowedJournal:
    """For `trainer.data.BatchReader` of a rank that follows: the journal as rank 0 has told it, one step at a time."""

    def __init__(self) -> None:
        self._entry: Entry | None = None

    def tell(self, entry: Entry) -> None:
        """What the next batch is made by."""
        self._entry = entry

    def entry(self, step: int) -> Entry | None:
        """What rank 0 said of batch `step`."""
        return self._entry if self._entry is not None and self._entry.step == step else None

    def covers(self, step: int) -> bool:
        """Always: rank 0 has closed every batch that is asked for."""
        return True

    def append(self, entry: Entry) -> None:
        """What follows from rank 0's word needs no writing."""


def micro_batches(examples: Sequence[Example], most: int) -> list[list[Example]]:
    """`examples` in groups of at most `most` (0: one group), of like lengths of history so that little is padded."""
    if not most or len(examples) <= most:
        return [list(examples)] if examples else []
    ordered = sorted(examples, key=lambda example: len(example.history))
    count = -(-len(ordered) // most)
    return [ordered[place * len(ordered) // count : (place + 1) * len(ordered) // count] for place in range(count)]


def ntp_parts(ranks: Ranks, batches: Sequence[Batch], config: ModelConfig) -> Parts:
    """NTP and balance loss of the global batch, of which this rank has `batches`: none, one, or several micro-batches.

    Both are means over the global batch. NTP: a part's mean counts by its share of the target items. Balance (E Σ f_e
    P_e): f over all ranks and micro-batches enters every part's gradient, so it must be known before the first; one
    batch a rank counts in its own forward pass, several in a forward pass without gradients before.
    """

    def parts(model: OneRec) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        if ranks.size == 1 and len(batches) == 1:
            yield model.loss(batches[0])
            return
        if len(batches) == 1:
            yield model.loss(batches[0], ranks.sum_)
            return
        size = 1 + config.decoder_layers * config.experts
        census = torch.zeros(size, dtype=torch.int64, device=model.bos.device)
        with torch.no_grad():
            for batch in batches:
                census += model.census(batch)
        ranks.sum_(census)
        for batch in batches:
            yield model.loss(batch, lambda own: census)

    return parts


def weighted(part: tuple[Tensor, dict[str, Any]], share: float) -> tuple[Tensor, dict[str, Any]]:
    """A loss and stats that are means over this rank's `share` of something, as a part of the mean over the whole."""
    loss, stats = part
    return loss * share, {name: value * share for name, value in stats.items()}
