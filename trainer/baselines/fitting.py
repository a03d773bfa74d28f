"""Training that the item transformers share: batches, early stopping on held-out next items, and scoring.

Shapes: B sequences, T places, N items. A row holds items 0..N-1, `START` (the place before the first item, or a masked
item) or `PADDING`.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onerec.errors import UserError
from trainer.baselines.transformer import left_padded, reset

Sequences = Sequence[Sequence[int] | NDArray[np.integer]]

CELLS = 1 << 25
"""Scores held at once: 128 MB of fp32, whatever the batch and the catalogue are."""
MOST_VALIDATED = 2000
PADDING = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankerConfig:
    """An item transformer and its training; the published values, scaled to catalogues of some thousand items.

    `length`: how many of the newest items it sees (SASRec on Amazon: 50). `epochs` is a bound: training ends when NDCG@10
    of the held-out items has not risen for `patience` epochs, and the best epoch's weights are kept.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.2
    length: int = 50
    learning_rate: float = 1e-3
    batch: int = 128
    epochs: int = 200
    patience: int = 10
    seed: int = 0


class Epoch(NamedTuple):
    """How training stands after an epoch: mean loss in nats a predicted item, and NDCG@10 of the held-out items."""

    number: int
    loss: float
    ndcg: float


class Fit(NamedTuple):
    """What training gave: epochs run, the one whose weights were kept (1-based), its NDCG@10, and the time it took."""

    epochs: int
    best: int
    ndcg: float
    seconds: float


Heard = Callable[[Epoch], None]


class Held(NamedTuple):
    """What early stopping looks at: histories and the item that came next."""

    histories: list[list[int]]
    targets: list[int]


def split(sequences: Sequences, seed: int) -> tuple[list[list[int]], Held]:
    """Hold out the last item of a tenth of the sequences of two items or more, at least one and at most 2,000."""
    rows = [[int(item) for item in sequence] for sequence in sequences]
    able = [place for place, row in enumerate(rows) if len(row) > 1]
    if not able:
        raise UserError("no sequence has two items or more: nothing comes after anything; give longer sequences")
    count = min(MOST_VALIDATED, max(1, len(able) // 10))
    chosen = np.random.default_rng(seed).choice(len(able), count, replace=False)
    held = Held([], [])
    for place in sorted(able[number] for number in chosen):
        held.histories.append(rows[place][:-1])
        held.targets.append(rows[place][-1])
        rows[place] = rows[place][:-1]
    return [row for row in rows if row], held


def ndcg10(log_probs: NDArray[np.floating], targets: Sequence[int]) -> float:
    """Mean NDCG@10 of `targets` [B] among all items of `log_probs` [B, N]; equals rank by the lower row."""
    wanted = np.asarray(targets)
    own = log_probs[np.arange(len(wanted)), wanted][:, None]
    equal_before = (log_probs == own) & (np.arange(log_probs.shape[1]) < wanted[:, None])
    places = 1 + (log_probs > own).sum(1) + equal_before.sum(1)
    return float(np.where(places <= 10, 1.0 / np.log2(1.0 + places), 0.0).mean())


class TransformerRanker(ABC):
    """An item transformer: `fit` on sequences of catalogue rows, then `log_probs` of the next item.

    Same seed, sequences and number of threads: same weights, byte for byte (CPU).
    """

    def __init__(self, items: int, config: RankerConfig, network: nn.Module, device: str | None) -> None:
        self.items, self.config = items, config
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        reset(network, torch.Generator().manual_seed(config.seed))
        self.network = network.to(self.device)

    @abstractmethod
    def _rows(self, sequences: list[list[int]]) -> Tensor:
        """Training rows int64 [R, T] of all sequences."""

    @abstractmethod
    def _loss(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        """Summed loss over the predicted items of `rows` [b, T], and their number."""

    @abstractmethod
    def _scores(self, histories: list[list[int]]) -> Tensor:
        """Scores of the next item, [B, N], softmax of which is its distribution."""

    def fit(self, sequences: Sequences, held: Held | None = None, heard: Heard = lambda epoch: None) -> Fit:
        """Train on `sequences` (catalogue rows, oldest first) until the held-out items get no better.

        held: what early stopping looks at, by default the last items of a tenth of the sequences. Raises UserError
        where no sequence has two items.
        """
        began = time.monotonic()
        if held is None:
            training, held = split(sequences, self.config.seed)
        else:
            training = [[int(item) for item in sequence] for sequence in sequences if len(sequence)]
        rows = self._rows(training)
        if not len(rows):
            raise UserError("no sequence has two items or more: nothing comes after anything; give longer sequences")
        generator = torch.Generator().manual_seed(self.config.seed)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.config.learning_rate)
        best, kept, epoch = Epoch(0, float("nan"), -1.0), copy.deepcopy(self.network.state_dict()), 0
        # Dropout draws from the process' generator; a fork leaves that as it was for whoever comes after.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            for epoch in range(1, self.config.epochs + 1):
                loss = self._epoch(rows, optimizer, generator)
                now = Epoch(epoch, loss, ndcg10(self.log_probs(held.histories), held.targets))
                heard(now)
                if now.ndcg > best.ndcg:
                    best, kept = now, copy.deepcopy(self.network.state_dict())
                elif epoch - best.number >= self.config.patience:
                    break
        self.network.load_state_dict(kept)
        return Fit(epoch, best.number, best.ndcg, time.monotonic() - began)

    @torch.no_grad()
    def log_probs(self, histories: Sequences) -> NDArray[np.float32]:
        """Float32 [B, N]: log P(next item) after each history (rows, oldest first, any length, also none)."""
        self.network.eval()
        lists = [[int(item) for item in history] for history in histories]
        block = max(1, min(512, CELLS // self.items))
        blocks = (self._scores(lists[start : start + block]) for start in range(0, len(lists), block))
        found = [torch.log_softmax(scores, -1).cpu().numpy() for scores in blocks]
        return np.concatenate(found) if found else np.empty((0, self.items), np.float32)

    def _epoch(self, rows: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> float:
        """One pass over the rows in a new order; mean loss a predicted item."""
        self.network.train()
        total, predicted = 0.0, 0
        part = max(1, CELLS // (rows.shape[1] * self.items))
        for chosen in torch.randperm(len(rows), generator=generator).split(self.config.batch):
            optimizer.zero_grad()
            counted = 0
            # Gradients of sums add up, so that the memory of a batch does not depend on its size.
            for few in rows[chosen].split(part):
                loss, count = self._loss(few, generator)
                loss.backward()
                counted += count
                total += float(loss.detach())
            for parameter in self.network.parameters():
                if parameter.grad is not None:
                    parameter.grad /= max(1, counted)
            optimizer.step()
            predicted += counted
        return total / max(1, predicted)


def causal_rows(sequences: list[list[int]], start: int, length: int) -> Tensor:
    """Rows int64 [R, length + 1] for next-item training: `start` and the items, so that each item is predicted once.

    A long sequence is cut from its end into rows that share one item: the last of a row is the first of the next.
    """
    pieces: list[list[int]] = []
    for sequence in sequences:
        whole = [start, *sequence]
        for end in range(len(whole), 1, -length):
            pieces.append(whole[max(0, end - length - 1) : end])
    longest = max((len(piece) for piece in pieces), default=0)
    return left_padded(pieces, min(length + 1, longest), PADDING)
