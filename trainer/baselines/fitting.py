"""Training that the item transformers share: batches, early stopping on held-out next items, and scoring.

Shapes: B sequences, T places, N items. A row holds items 0..N-1, N (the place before the first item, or a masked item) and
`PADDING`.
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
NOTHING_FOLLOWS = "no sequence has two items or more: nothing comes after anything; give longer sequences"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankerConfig:
    """An item transformer and its training; the published values, scaled to catalogues of some thousand items.

    `length`: how many of the newest items it sees (SASRec on Amazon: 50). `epochs` is a bound: training ends when neither
    NDCG@10 nor the likelihood of the held-out items has risen for `patience` epochs.
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
    """How training stands after an epoch (from 1): mean training loss; NDCG@10 and mean log P of the held-out items."""

    number: int
    loss: float
    ndcg: float
    likelihood: float


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
        raise UserError(NOTHING_FOLLOWS)
    count = min(MOST_VALIDATED, max(1, len(able) // 10))
    chosen = np.random.default_rng(seed).choice(len(able), count, replace=False)
    held = Held([], [])
    for place in sorted(able[number] for number in chosen):
        held.histories.append(rows[place][:-1])
        held.targets.append(rows[place][-1])
        rows[place] = rows[place][:-1]
    return [row for row in rows if row], held


def few(held: Held) -> Held:
    """At most 2,000 of the held-out items, evenly spread over them."""
    places = np.linspace(0, len(held.targets) - 1, min(MOST_VALIDATED, len(held.targets))).astype(int)
    return Held([held.histories[place] for place in places], [held.targets[place] for place in places])


def validate(log_probs: Callable[[Sequences], NDArray[np.float32]], held: Held, items: int) -> tuple[float, float]:
    """NDCG@10 and mean log P of the held-out items among all `items`, some histories at a time."""
    block = max(1, min(512, CELLS // items))
    ndcg = likelihood = 0.0
    for start in range(0, len(held.targets), block):
        targets = held.targets[start : start + block]
        found = log_probs(held.histories[start : start + block])
        ndcg += ndcg10(found, targets) * len(targets)
        likelihood += float(found[np.arange(len(targets)), targets].sum())
    return ndcg / len(held.targets), likelihood / len(held.targets)


def ndcg10(log_probs: NDArray[np.floating], targets: Sequence[int]) -> float:
    """Mean NDCG@10 of `targets` [B] among all items of `log_probs` [B, N]: equals by the lower row, -inf is no place."""
    places = ranks(log_probs, targets)
    return float(np.where(places <= 10, 1.0 / np.log2(1.0 + places), 0.0).mean())


def ranks(log_probs: NDArray[np.floating], targets: Sequence[int]) -> NDArray[np.float64]:
    """Place [B], from 1, of each of `targets` [B] among all items of `log_probs` [B, N]; infinite for one of -inf."""
    wanted = np.asarray(targets)
    own = log_probs[np.arange(len(wanted)), wanted][:, None]
    equal_before = (log_probs == own) & (np.arange(log_probs.shape[1]) < wanted[:, None])
    places = 1.0 + (log_probs > own).sum(1) + equal_before.sum(1)
    return np.where(own[:, 0] > -np.inf, places, np.inf)


class Stopping:
    """Early stopping, which keeps the weights of the epoch of the highest NDCG@10, equals by likelihood.

    A slow beginning, where no held-out item is among the ten best yet, still raises the likelihood: so training goes on
    as long as either rises.
    """

    def __init__(self, network: nn.Module, patience: int) -> None:
        self._network, self._patience = network, patience
        self._kept = copy.deepcopy(network.state_dict())
        self._likelihood, self._risen = -np.inf, 0
        self._began = time.monotonic()
        self.best = Epoch(0, float("nan"), -1.0, -np.inf)
        self.last = 0

    def done(self, epoch: Epoch) -> bool:
        """Take note of an epoch; whether it was the last."""
        self.last = epoch.number
        if (epoch.ndcg, epoch.likelihood) > (self.best.ndcg, self.best.likelihood):
            self.best, self._kept, self._risen = epoch, copy.deepcopy(self._network.state_dict()), epoch.number
        if epoch.likelihood > self._likelihood:
            self._likelihood, self._risen = epoch.likelihood, epoch.number
        return epoch.number - self._risen >= self._patience

    def finish(self) -> Fit:
        """Give the network the best weights."""
        self._network.load_state_dict(self._kept)
        return Fit(self.last, self.best.number, self.best.ndcg, time.monotonic() - self._began)


class TransformerRanker(ABC):
    """An item transformer: `fit` on sequences of catalogue rows, then `log_probs` of the next item.

    Same seed, sequences and number of threads: same weights, byte for byte (CPU).
    """

    def __init__(
        self, items: int, config: RankerConfig, network: Callable[[], nn.Module], device: str | None
    ) -> None:
        self.items, self.config = items, config
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # The layers of torch draw their first weights from the process' generator, which is not ours to move.
        with torch.random.fork_rng():
            built = network()
        reset(built, torch.Generator().manual_seed(config.seed))
        self.network = built.to(self.device)

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

        held: what early stopping looks at, no more than 2,000 of it; by default the last items of a tenth of the
        sequences. Raises UserError where no sequence has two items.
        """
        if held is None:
            training, held = split(sequences, self.config.seed)
        else:
            training = [[int(item) for item in sequence] for sequence in sequences if len(sequence)]
            held = few(held)
        rows = self._rows(training)
        if not len(rows):
            raise UserError(NOTHING_FOLLOWS)
        generator = torch.Generator().manual_seed(self.config.seed)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.config.learning_rate)
        stopping = Stopping(self.network, self.config.patience)
        # Dropout draws from the process' generator; a fork leaves that as it was for whoever comes after.
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            for number in range(1, self.config.epochs + 1):
                loss = self._epoch(rows, optimizer, generator)
                epoch = Epoch(number, loss, *validate(self.log_probs, held, self.items))
                heard(epoch)
                if stopping.done(epoch):
                    break
        return stopping.finish()

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
