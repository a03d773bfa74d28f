"""The graph against torch: the same sessions in the same order, checked before a version is shown to anyone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.bundle import Parity, RewardParity, Snapshot
from onerec.errors import Failure
from serving_config.recommend.engine import Beams
from serving_config.recommend.graphs import pad
from trainer.config import ModelConfig

if TYPE_CHECKING:
    from trainer.model import OneRec
    from trainer.reward import RewardModel

PARITY_LENGTHS = (20,)
"""Lengths of the histories that a publish compares. A publish changes weights and catalogue, not the graph: that it equals
torch at every length, the empty history too, is for the tests of the template. Each length costs `small` 0.7 s."""
SCORE_TOLERANCE = 1e-3
"""Largest difference between the scores of torch and of the graph, in nats over a session's ~15 codes."""

REWARD_TOLERANCE = 1e-4
"""Largest difference between a reward, which lies between 0 and 1, of torch and of the graph."""


class ParityFault(Failure):
    """Torch and the graph do not agree."""


def parity_rows(snapshot: Snapshot, config: ModelConfig) -> list[list[int]]:
    """Catalogue rows of the histories to compare by; the same for the same catalogue."""
    items = snapshot.trie.items
    lengths = [min(length, items, config.history_length) for length in PARITY_LENGTHS]
    return [[int(row) for row in np.linspace(0, items - 1, length)] for length in lengths]


def torch_beams(
    model: OneRec, snapshot: Snapshot, histories: list[NDArray[np.int64]], width: int
) -> Beams:
    """The same search in torch, the reference."""
    import torch

    from trainer.beam import beam_search, trie_tensors

    codes, mask = pad(histories, snapshot.trie.levels)
    trie = trie_tensors(snapshot.trie)
    threads = torch.get_num_threads()
    # OpenMP's threads spin: beside a busy trainer two of them were 15 times slower than one.
    torch.set_num_threads(1)
    try:
        found = beam_search(model, trie, torch.from_numpy(codes), torch.from_numpy(mask), width=width)
    finally:
        torch.set_num_threads(threads)
    return Beams(found.leaves.numpy(), found.scores.numpy())


def compare(reference: Beams, served: Beams) -> Parity:
    """Check that the graph finds torch's sessions in torch's order, equals within SCORE_TOLERANCE interchangeable.

    Raises ParityFault naming the first difference.
    """
    sessions, largest = 0, 0.0
    for row in range(len(reference.leaves)):
        live = reference.leaves[row, :, 0] >= 0
        if not np.array_equal(live, served.leaves[row, :, 0] >= 0):
            raise ParityFault(f"parity: torch finds {live.sum()} sessions for history {row}, the graph another number")
        scores = reference.scores[row, live].astype(np.float64)
        difference = np.abs(scores - served.scores[row, live])
        if not (difference <= SCORE_TOLERANCE).all():  # not `>`: NaN must not pass
            raise ParityFault(f"parity: scores of history {row} differ by {difference.max():.2g} between torch and the graph")
        largest = max(largest, float(difference.max(initial=0.0)))
        gaps = np.abs(np.diff(scores))
        tied = np.append(gaps <= SCORE_TOLERANCE, True) | np.append(False, gaps <= SCORE_TOLERANCE)
        # The last beam's neighbour was cut off, so it may be tied with one that is not here: only its score is checked.
        same = (reference.leaves[row, live] == served.leaves[row, live]).all(axis=1)
        if not (same | tied[: len(same)]).all():
            place = int(np.flatnonzero(~(same | tied[: len(same)]))[0])
            raise ParityFault(f"parity: session {place + 1} of history {row} differs between torch and the graph")
        sessions += int(live.sum())
    return Parity(histories=len(reference.leaves), sessions=sessions, score_difference=largest)


def torch_rewards(
    model: RewardModel, histories: list[NDArray[np.int64]], sessions: NDArray[np.int64]
) -> NDArray[np.float32]:
    """What `RewardGraph.rewards` gives, in torch, the reference."""
    import torch

    codes, mask = pad([history[-model.config.history_length :] for history in histories], model.config.levels)
    full = torch.ones(sessions.shape[:3], dtype=torch.bool)
    with torch.no_grad():
        found = model.rewards(torch.from_numpy(codes), torch.from_numpy(mask), torch.from_numpy(sessions), full)
    return found.numpy()


def compare_rewards(reference: NDArray[np.float32], served: NDArray[np.float32]) -> RewardParity:
    """Check that the graph gives torch's rewards [B, W, 4] within REWARD_TOLERANCE; raises ParityFault where not."""
    difference = np.abs(reference - served)
    if not (difference <= REWARD_TOLERANCE).all():  # not `>`: NaN must not pass
        raise ParityFault(f"parity: rewards differ by {difference.max():.2g} between torch and the graph")
    return RewardParity(
        histories=len(reference), sessions=reference.shape[1], difference=float(difference.max(initial=0.0))
    )
