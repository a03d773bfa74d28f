"""Test-then-train: what a model ranks before it learns the answer, as hit rate and NDCG of next item and session.

Rules. The next item is the first known item of a window; the model ranks by a beam search for one item, the items of
one semantic ID stand together in catalogue order. The session is the window's items against a generated session of m
items: the best beam (`session_*`), and the best of all beams by recall (`best_recall`). No candidate is filtered out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from trainer.baselines import CoVisitation, Popularity
from trainer.data import Example, to_arrays

if TYPE_CHECKING:
    from exporter.trie import Trie
    from trainer.model import OneRec

Scores = dict[str, float]
ITEM_METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10")
SESSION_METRICS = ("session_hit", "session_recall", "session_ndcg")
RANKED = 10


class PreferenceLine(msgspec.Struct, frozen=True, kw_only=True):
    """The preference pairs of a step: mean loss, margin and share that the policy orders rightly, before the step.

    `age`: versions that the oldest pair's snapshot was behind.
    """

    pairs: int
    loss: float | None
    margin: float | None
    accuracy: float | None
    age: int


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of RUN/metrics.jsonl: a batch. `scores` holds sums over its `scored` windows by recommender.

    `round`, `sequence`: pass and last session of the batch; `ts`: event time in ms of its newest window; `loss`: mean
    NTP loss in nats a code before the batch was learnt; `gradient`: norm before clipping; `applied` False: not finite,
    the step was skipped; `expert_load`: smallest and largest share of an expert over layers, 1 = even; `preference`: None
    for a step without pairs; `reward_loss`: the reward model's, over all sessions of the batch, None without one.
    """

    step: int
    round: int
    sequence: int
    ts: int
    sessions: int
    windows: int
    codes: int
    loss: float | None
    gradient: float | None
    applied: bool
    expert_load: tuple[float, float] | None
    scored: int
    scores: dict[str, Scores]
    preference: PreferenceLine | None = None
    reward_loss: float | None = None


def finite(value: Any) -> float | None:
    """A number or a tensor of one as a float; None where it is not finite."""
    number = float(value)
    return number if math.isfinite(number) else None


def rank_scores(ranked: Sequence[int], target: int) -> Scores:
    """Hit rate and NDCG of one relevant item in a ranking: NDCG@k = 1 / log2(1 + rank) within k, else 0."""
    place = next((place for place, row in enumerate(ranked, 1) if row == target), None)
    found: Scores = {}
    for k in (1, 5, 10):
        found[f"hit@{k}"] = float(place is not None and place <= k)
    for k in (5, 10):
        found[f"ndcg@{k}"] = 1.0 / math.log2(1 + place) if place is not None and place <= k else 0.0
    return found


def session_scores(generated: Sequence[int], targets: Sequence[int]) -> Scores:
    """A generated session against the items watched: any in common, their share, and NDCG with binary relevance."""
    wanted = set(targets)
    gains = [1.0 / math.log2(1 + place) for place, row in enumerate(generated, 1) if row in wanted]
    ideal = sum(1.0 / math.log2(1 + place) for place in range(1, min(len(wanted), len(generated)) + 1))
    return {
        "session_hit": float(bool(gains)),
        "session_recall": len(gains) / len(wanted),
        "session_ndcg": sum(gains) / ideal if ideal else 0.0,
    }


def is_scored(session_id: str, share: float) -> bool:
    """Whether a session is in the scored share: a hash of its id, so the same in every run."""
    return zlib.crc32(session_id.encode()) < share * 2**32


def add(total: Scores, scores: Mapping[str, float]) -> None:
    """Add `scores` into `total`, name by name."""
    for name, value in scores.items():
        total[name] = total.get(name, 0.0) + value


def score_baselines(
    examples: Iterable[Example], popularity: Popularity, covisitation: CoVisitation, *, m: int
) -> dict[str, Scores]:
    """Sums over `examples` of both baselines; their session is the first m of their ranking."""
    totals: dict[str, Scores] = {"popularity": {}, "covisitation": {}}
    k = max(RANKED, m)
    for example in examples:
        target, targets = int(example.targets[0]), example.targets.tolist()
        rankings = {"popularity": popularity.rank(k), "covisitation": covisitation.rank(example.history.tolist(), k)}
        for name, ranked in rankings.items():
            add(totals[name], rank_scores(ranked[:RANKED], target))
            add(totals[name], session_scores(ranked[:m], targets))
    return totals


class ModelScorer:
    """Scores windows by beam search with the weights as they are; built anew when the catalogue grows."""

    def __init__(self, model: OneRec, item_codes: np.ndarray, *, beams: int, device: str = "cpu") -> None:
        from exporter.trie import build_trie
        from trainer.beam import trie_tensors

        self._model, self._item_codes, self._device = model, item_codes, device
        self._beams = max(RANKED, beams)
        self._trie: Trie = build_trie(item_codes, model.config.codes)
        self._tensors = trie_tensors(self._trie, device)

    def search(self, examples: list[Example]) -> tuple[list[list[int]], list[np.ndarray]]:
        """Of each window the best `RANKED` rows as next item, and its sessions, rows `[live beams, m]`; best first.

        One search gives both: where it has written one item, it is the search for one item.
        """
        import torch

        from trainer.beam import finish, first_item, next_item

        m = self._model.config.session_items
        arrays = to_arrays(examples, self._item_codes, m=m)
        history = torch.from_numpy(arrays.history).to(self._device)
        mask = torch.from_numpy(arrays.history_mask).to(self._device)
        with torch.no_grad():
            state, memory = first_item(self._model, self._tensors, history, mask, width=self._beams)
            firsts = finish(state).leaves[:, :, 0].cpu().numpy()
            for _ in range(m - 1):
                state = next_item(self._model, self._tensors, state, memory)
        beams = finish(state)
        pairs = zip(beams.leaves.cpu().numpy(), beams.alive.cpu().numpy(), strict=True)
        sessions = [self._trie.session_rows(found[live]) for found, live in pairs]
        return [self._expand(leaves) for leaves in firsts], sessions

    def score(self, examples: list[Example]) -> Scores:
        """Sums of all metrics over `examples`."""
        total: Scores = {}
        if not examples:
            return total
        for example, ranked, sessions in zip(examples, *self.search(examples), strict=True):
            targets = example.targets.tolist()
            scores = [session_scores(session.tolist(), targets) for session in sessions]
            best = max((score["session_recall"] for score in scores), default=0.0)
            add(total, rank_scores(ranked, targets[0]))
            add(total, (scores[0] if scores else dict.fromkeys(SESSION_METRICS, 0.0)) | {"best_recall": best})
        return total

    def _expand(self, leaves: np.ndarray) -> list[int]:
        """Rows of the items of `leaves` [W], best first; -1 is a dead beam."""
        rows = [int(row) for leaf in leaves if leaf >= 0 for row in self._trie.leaf_items(int(leaf))]
        return rows[:RANKED]


def read_metrics(path: Path) -> list[Line]:
    """All lines of RUN/metrics.jsonl; a last line that is being written is left out."""
    content = path.read_bytes() if path.exists() else b""
    decoder = msgspec.json.Decoder(Line)
    return [decoder.decode(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def means(lines: Iterable[Line]) -> tuple[int, dict[str, Scores]]:
    """Scored windows, and the mean of every metric over them by recommender."""
    windows = 0
    totals: dict[str, Scores] = {}
    for line in lines:
        windows += line.scored
        for name, scores in line.scores.items():
            add(totals.setdefault(name, {}), scores)
    return windows, {
        name: {metric: value / windows for metric, value in scores.items()}
        for name, scores in totals.items()
        if windows
    }


def mean_loss(lines: Iterable[Line]) -> float | None:
    """Mean test-then-train loss in nats a code; None without a finite one."""
    pairs = [(line.loss, line.codes) for line in lines if line.loss is not None]
    codes = sum(count for _, count in pairs)
    return sum(loss * count for loss, count in pairs) / codes if codes else None


def bins(lines: Sequence[Line], count: int) -> list[list[Line]]:
    """The lines in at most `count` consecutive groups of about equally many scored windows, for curves."""
    total = max(1, sum(line.scored for line in lines))
    groups: dict[int, list[Line]] = {}
    seen = 0
    for line in lines:
        groups.setdefault((2 * seen + line.scored) * count // (2 * total), []).append(line)
        seen += line.scored
    return [groups[place] for place in sorted(groups)]
