"""A bundle in memory: histories of item ids in, sessions of item ids out, by one run of the ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from exporter.bundle import GRAPH_FOLDER, REWARD_FOLDER, Manifest, Snapshot, read_catalogue, verify_bundle
from exporter.trie import Trie
from onerec.errors import UserError
from serving_config.recommend.errors import RequestError
from serving_config.recommend.graphs import open_graph, pad
from serving_config.recommend.rewards import RewardGraph, best_by_reward
from trainer.reward_weights import TARGETS

Select = Literal["likelihood", "reward"]

MAX_ROWS = 32
"""Rows of one run of a graph: bounds its memory, whatever clients send."""


class History(NamedTuple):
    """A history as the model reads it: codes int64 [T, L], and how many of its item ids the catalogue lacks."""

    codes: NDArray[np.int64]
    unknown: int


class Beams(NamedTuple):
    """leaves int64 [B, W, m], scores float32 [B, W], best first; dead beams come last, with leaves -1."""

    leaves: NDArray[np.int64]
    scores: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """One row asked for: a history as codes int64 [T, L], how many sessions, and what chooses among the beams."""

    history: NDArray[np.int64]
    count: int = 1
    select: Select = "likelihood"


class Sessions(NamedTuple):
    """items [count, m] of UTF-8 bytes, scores float32 [count], rewards float32 [count, 4]; best first by what chose.

    Rewards are NaN where the version has no reward model.
    """

    items: NDArray[np.object_]
    scores: NDArray[np.float32]
    rewards: NDArray[np.float32]


class _Candidates(NamedTuple):
    """The sessions of one row that are scored: leaves int64 [n, m], scores float32 [n], by falling likelihood."""

    leaves: NDArray[np.int64]
    scores: NDArray[np.float32]


class Graph:
    """The ONNX graph with the trie of one catalogue, on one device.

    Args:
        folder: where the graph files and their weights are.
        trie: what the search may generate.
        threads: ONNX Runtime's threads within an operator.
        device: CUDA device id, None = CPU; the CPU too where CUDA cannot be used, with a line on standard error.
    """

    def __init__(self, folder: Path, trie: Trie, *, threads: int = 2, device: int | None = None) -> None:
        self._levels = trie.levels
        self._session, self._place = open_graph(folder, threads=threads, device=device)
        wanted = {graph_input.name for graph_input in self._session.get_inputs()}
        # Put on the device once: a request moves only its history.
        self._arrays = {
            name: ort.OrtValue.ortvalue_from_numpy(array, *self._place)
            for name, array in trie.arrays().items()
            if name in wanted
        }
        if missing := wanted - set(self._arrays) - {"history", "history_mask"}:
            raise UserError(f"graph {folder} asks for unknown inputs {sorted(missing)}; publish again")

    def search(self, histories: Sequence[NDArray[np.int64]]) -> Beams:
        """One run of the graph over ragged histories, each int64 [T, L]."""
        codes, mask = pad(histories, self._levels)
        inputs = {
            "history": ort.OrtValue.ortvalue_from_numpy(codes, *self._place),
            "history_mask": ort.OrtValue.ortvalue_from_numpy(mask, *self._place),
        }
        leaves, scores = self._session.run_with_ort_values(["leaves", "scores"], inputs | self._arrays)
        return Beams(leaves.numpy(), scores.numpy())


class Engine:
    """A verified bundle: graph, trie, item map and, where it was published with one, reward model.

    Args:
        folder: the bundle; its hashes are recomputed, UserError where it is damaged.
        threads: ONNX Runtime's threads within an operator.
        device: CUDA device id, None = CPU.
    """

    def __init__(self, folder: Path, *, threads: int = 2, device: int | None = None) -> None:
        self.manifest: Manifest = verify_bundle(folder)
        self.snapshot: Snapshot = read_catalogue(folder)
        if self.snapshot.codebook_version != self.manifest.codebook_version:
            raise UserError(f"bundle {folder}: weights and catalogue are of different codebooks; publish again")
        self._rows = {item_id: row for row, item_id in enumerate(self.snapshot.item_ids)}
        self._ids = np.array([item_id.encode() for item_id in self.snapshot.item_ids], dtype=object)
        self._graph = Graph(folder / GRAPH_FOLDER, self.snapshot.trie, threads=threads, device=device)
        reward = self.manifest.reward
        self._rewards = (
            None if reward is None
            else RewardGraph(folder / REWARD_FOLDER, reward.config, threads=threads, device=device)
        )  # fmt: skip
        lengths = [self.manifest.model_config.history_length, reward.config.history_length if reward else 0]
        self._longest = max(lengths)

    @property
    def has_rewards(self) -> bool:
        """Whether this version can score sessions, and so choose by reward."""
        return self._rewards is not None

    def history(self, item_ids: Iterable[str]) -> History:
        """The newest known items as codes, as many as a model reads; unknown ids are skipped and counted."""
        ids = list(item_ids)
        rows = [row for row in map(self._rows.get, ids) if row is not None]
        newest = rows[-self._longest :]
        return History(self.snapshot.item_codes[newest].astype(np.int64), len(ids) - len(rows))

    def search(self, histories: Sequence[NDArray[np.int64]]) -> Beams:
        """One run of the search over ragged histories, each int64 [T, L]; the newest `history_length` are read."""
        return self._graph.search([history[-self.manifest.model_config.history_length :] for history in histories])

    def answer(self, wanted: Sequence[Wanted]) -> list[Sessions | RequestError]:
        """Sessions of every row, in as few runs of the graphs as `MAX_ROWS` allows; an error concerns its row alone.

        By likelihood: the best `count` live beams. By reward: all live beams are scored and the `count` of the highest
        combined reward are taken, of equals the likelier one. Refused: a catalogue that gives fewer than `count`
        sessions, naming how many there are; `reward` in a version without a reward model.
        """
        beams: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        for start in range(0, len(wanted), MAX_ROWS):
            found = self.search([row.history for row in wanted[start : start + MAX_ROWS]])
            beams += zip(found.leaves, found.scores, strict=True)
        candidates: dict[int, _Candidates] = {}
        answers: dict[int, Sessions | RequestError] = {}
        for place, (row, (leaves, scores)) in enumerate(zip(wanted, beams, strict=True)):
            try:
                candidates[place] = self._candidates(row, leaves, scores)
            except RequestError as error:
                answers[place] = error
        rewards = self._score({place: wanted[place].history for place in candidates}, candidates)
        for place, found_here in candidates.items():
            try:
                answers[place] = self._choose(wanted[place], found_here, rewards[place])
            except RequestError as error:
                answers[place] = error
        return [answers[place] for place in range(len(wanted))]

    def _candidates(self, row: Wanted, leaves: NDArray[np.int64], scores: NDArray[np.float32]) -> _Candidates:
        """The live beams of one row that may be returned, from leaves [W, m], scores [W]."""
        if row.select == "reward" and not self.has_rewards:
            raise RequestError("select = 'reward': this version was published without a reward model; use 'likelihood'")
        live = np.flatnonzero(leaves[:, 0] >= 0)
        if len(live) < row.count:
            catalogue = f"the catalogue of {self.manifest.items} items"
            if not len(live):
                raise RequestError(f"{catalogue} is too small for a session of {leaves.shape[1]}; add items")
            raise RequestError(
                f"count = {row.count}, but {catalogue} gives only {len(live)} different sessions; ask for at most {len(live)}"
            )
        taken = live if row.select == "reward" else live[: row.count]
        return _Candidates(leaves[taken], scores[taken])

    def _score(
        self, histories: dict[int, NDArray[np.int64]], candidates: dict[int, _Candidates]
    ) -> dict[int, NDArray[np.float32]]:
        """Rewards [n, 4] of each row's candidates; rows with equally many sessions share a run, so none is padded."""
        if self._rewards is None:
            return {place: np.full((len(row.leaves), len(TARGETS)), np.nan, np.float32) for place, row in candidates.items()}
        alike: dict[int, list[int]] = {}
        for place, row in candidates.items():
            alike.setdefault(len(row.leaves), []).append(place)
        found: dict[int, NDArray[np.float32]] = {}
        for places in alike.values():
            for start in range(0, len(places), MAX_ROWS):
                some = places[start : start + MAX_ROWS]
                codes = self.snapshot.trie.tuples[np.stack([candidates[place].leaves for place in some])]
                rewards = self._rewards.rewards([histories[place] for place in some], codes.astype(np.int64))
                found |= zip(some, rewards, strict=True)
        return found

    def _choose(self, row: Wanted, found: _Candidates, rewards: NDArray[np.float32]) -> Sessions:
        if row.select == "reward":
            assert self.manifest.reward is not None  # noqa: S101 - `_candidates` refused the others
            try:
                best = best_by_reward(rewards, self.manifest.reward.weights, row.count)
            except ValueError as error:
                raise RequestError(f"select = 'reward': {error}", client_fault=False) from None
        else:
            best = np.arange(row.count)
        items = self._ids[self.snapshot.trie.session_rows(found.leaves[best])]
        return Sessions(items, found.scores[best], rewards[best])
