"""TIGER (Rajput et al., NeurIPS 2023) as our own model with m = 1: one item's semantic ID is generated from the history.

Also OneRec itself (m > 1) on plain item sequences, where there are no sessions: every place of a sequence begins a
target of the next m items. Shapes: B histories, T items, N items, L levels, K codes, m items, W beams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.trie import build_trie
from onerec.errors import UserError
from trainer.baselines.fitting import NOTHING_FOLLOWS, Epoch, Fit, Held, Sequences, Stopping, few, split, validate
from trainer.beam import finish, first_item, trie_tensors
from trainer.config import ModelConfig
from trainer.model import Batch, OneRec
from trainer.optim import Optimizer

BATCH = 64
"""Histories searched at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTraining:
    """How a generator is trained on sequences; stops as `fitting.RankerConfig` says. `width`: beams of the validation."""

    learning_rate: float = 1e-3
    batch: int = 128
    epochs: int = 100
    patience: int = 5
    width: int = 20
    seed: int = 0


def fit_sequences(
    config: ModelConfig,
    item_codes: NDArray[np.integer],
    sequences: Sequences,
    training: SequenceTraining,
    *,
    held: Held | None = None,
    heard: Callable[[Epoch], None] = lambda epoch: None,
    device: str | None = None,
) -> tuple[OneRec, Fit]:
    """A model of `config` trained to write the next `config.session_items` items at every place of `sequences`.

    item_codes int [N, L]; sequences and held as `TransformerRanker.fit` takes them. Same seed, sequences and threads:
    same weights, byte for byte (CPU). Raises UserError where no sequence has two items.
    """
    if held is None:
        sequences, held = split(sequences, training.seed)
    held = few(held)
    rows = [np.asarray(sequence, np.int64) for sequence in sequences]
    places = [(number, start) for number, row in enumerate(rows) for start in range(len(row))]
    if not any(len(row) > 1 for row in rows):
        raise UserError(NOTHING_FOLLOWS)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = OneRec(config)
    model.reset_parameters(torch.Generator().manual_seed(training.seed))
    model = model.to(device)
    optimizer = Optimizer(model, learning_rate=training.learning_rate, precision="fp32")
    ranker = BeamRanker(model, item_codes, width=training.width, device=device)
    stopping = Stopping(model, training.patience)
    rng = np.random.default_rng(training.seed)
    for number in range(1, training.epochs + 1):
        order = rng.permutation(len(places))
        total, codes = 0.0, 0
        for first in range(0, len(order), training.batch):
            chosen = [places[place] for place in order[first : first + training.batch]]
            pairs = [(rows[number][:start], rows[number][start:]) for number, start in chosen]
            batch = to_batch(pairs, item_codes, config, device)
            stats = optimizer.step(lambda model, batch=batch: model.loss(batch))  # type: ignore[misc]
            total += float(stats["ntp"]) * stats["tokens"]
            codes += stats["tokens"]
        # An item that no beam reached has no likelihood from them: that of the codes is asked for instead.
        ndcg, _ = validate(ranker.log_probs, held, len(item_codes))
        epoch = Epoch(number, total / codes, ndcg, ranker.likelihood(held.histories, held.targets))
        heard(epoch)
        if stopping.done(epoch):
            break
    fit = stopping.finish()
    return model.eval(), fit


class BeamRanker:
    """An `ItemRanker` of a generator: its `width` best semantic IDs; an item has the log-probability of its ID.

    Items of one ID stand together, in catalogue order; items that the search did not reach have -inf.
    """

    def __init__(
        self, model: OneRec, item_codes: NDArray[np.integer], *, width: int = 128, device: str | None = None
    ) -> None:
        self.model, self.width = model, width
        self.item_codes = np.asarray(item_codes)
        self.device = device or next(model.parameters()).device.type
        self._trie = build_trie(self.item_codes, model.config.codes)
        self._tensors = trie_tensors(self._trie, self.device)

    @torch.no_grad()
    def log_probs(self, histories: Sequences) -> NDArray[np.float32]:
        """Float32 [B, N] of the next item; see `trainer.rankings.ItemRanker`."""
        self.model.eval()
        found = np.full((len(histories), len(self.item_codes)), -np.inf, np.float32)
        for first in range(0, len(histories), BATCH):
            pairs = [(np.asarray(row, np.int64), np.zeros(1, np.int64)) for row in histories[first : first + BATCH]]
            batch = to_batch(pairs, self.item_codes, self.model.config, self.device)
            state, _ = first_item(self.model, self._tensors, batch.history, batch.history_mask, width=self.width)
            beams = finish(state)
            every = zip(beams.leaves[:, :, 0].tolist(), beams.scores.tolist(), strict=True)
            for row, (leaves, scores) in zip(found[first:], every, strict=False):
                for leaf, score in zip(leaves, scores, strict=True):
                    if leaf >= 0:
                        row[self._trie.leaf_items(leaf)] = score
        return found

    @torch.no_grad()
    def likelihood(self, histories: Sequences, targets: Sequence[int]) -> float:
        """Mean log P of the semantic IDs of `targets`, each after its history."""
        self.model.eval()
        total = 0.0
        for first in range(0, len(targets), BATCH):
            last = first + BATCH
            pairs = [
                (np.asarray(history, np.int64), np.array([target]))
                for history, target in zip(histories[first:last], targets[first:last], strict=True)
            ]
            total += float(self.model.session_log_prob(*self._one_item(pairs)).sum())
        return total / len(targets)

    def _one_item(self, pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Batch:
        batch = to_batch(pairs, self.item_codes, self.model.config, self.device)
        return batch._replace(targets=batch.targets[:, :1], target_mask=batch.target_mask[:, :1])


def to_batch(
    pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    item_codes: NDArray[np.integer],
    config: ModelConfig,
    device: str,
) -> Batch:
    """Pairs of history and what follows (rows) as the model reads them: the newest T items, the first m that follow."""
    n, m, levels = config.history_length, config.session_items, item_codes.shape[1]
    longest = max(1, max(min(n, len(history)) for history, _ in pairs))
    history = np.zeros((len(pairs), longest, levels), np.int64)
    targets = np.zeros((len(pairs), m, levels), np.int64)
    history_mask, target_mask = np.zeros((len(pairs), longest), bool), np.zeros((len(pairs), m), bool)
    for row, (before, after) in enumerate(pairs):
        before, after = before[-n:], after[:m]
        history[row, : len(before)] = item_codes[before]
        targets[row, : len(after)] = item_codes[after]
        history_mask[row, : len(before)] = True
        target_mask[row, : len(after)] = True
    arrays = (history, history_mask, targets, target_mask)
    return Batch(*(torch.from_numpy(array).to(device) for array in arrays))
