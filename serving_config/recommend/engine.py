"""A bundle in memory: histories of item ids in, sessions of item ids out, by one run of the ONNX graph."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from exporter.bundle import GRAPH_FOLDER, Manifest, Snapshot, read_catalogue, verify_bundle
from exporter.trie import Trie
from onerec.errors import UserError
from serving_config.recommend.errors import RequestError

GRAPH_FILE = "model.onnx"
CPU_GRAPH_FILE = "model.cpu.onnx"
"""The same graph as ONNX Runtime optimised it for the CPU: loads in half the time."""

MAX_ROWS = 32
"""Rows of one run of the graph: bounds its memory, whatever clients send."""

CUDA = "CUDAExecutionProvider"


class History(NamedTuple):
    """A history as the model reads it: codes int64 [T, L], and how many of its item ids the catalogue lacks."""

    codes: NDArray[np.int64]
    unknown: int


class Beams(NamedTuple):
    """leaves int64 [B, W, m], scores float32 [B, W], best first; dead beams come last, with leaves -1."""

    leaves: NDArray[np.int64]
    scores: NDArray[np.float32]


class Sessions(NamedTuple):
    """items [count, m] of UTF-8 bytes, scores float32 [count], best first."""

    items: NDArray[np.object_]
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
        self._session = open_session(folder, threads=threads, device=device)
        if device is not None and CUDA not in self._session.get_providers():
            # ONNX Runtime itself would go on without a word, with the graph that is slow on the CPU.
            sys.stderr.write("onerec: ONNX Runtime cannot use CUDA here (see its words above); running on the CPU\n")
            device = None
            self._session = open_session(folder, threads=threads, device=None)
        self._place = ("cuda", device) if device is not None else ("cpu", 0)
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
    """A verified bundle: graph, trie and item map.

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

    def history(self, item_ids: Iterable[str]) -> History:
        """The newest `history_length` known items as codes; unknown ids are skipped and counted."""
        ids = list(item_ids)
        rows = [row for row in map(self._rows.get, ids) if row is not None]
        newest = rows[-self.manifest.model_config.history_length :]
        return History(self.snapshot.item_codes[newest].astype(np.int64), len(ids) - len(rows))

    def search(self, histories: Sequence[NDArray[np.int64]]) -> Beams:
        """One run of the graph over ragged histories, each int64 [T, L]."""
        return self._graph.search(histories)

    def sessions(self, leaves: NDArray[np.int64], scores: NDArray[np.float32], count: int) -> Sessions:
        """The best `count` live beams of one row, leaves [W, m], scores [W], as item ids.

        Raises RequestError naming how many there are when the catalogue gives fewer.
        """
        live = np.flatnonzero(leaves[:, 0] >= 0)
        if len(live) < count:
            catalogue = f"the catalogue of {self.manifest.items} items"
            if not len(live):
                raise RequestError(f"{catalogue} is too small for a session of {leaves.shape[1]}; add items")
            raise RequestError(
                f"count = {count}, but {catalogue} gives only {len(live)} different sessions; ask for at most {len(live)}"
            )
        best = live[:count]
        return Sessions(self._ids[self.snapshot.trie.session_rows(leaves[best])], scores[best])


def pad(histories: Sequence[NDArray[np.int64]], levels: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ragged histories, each [T, L], as codes int64 [B, T, L] and mask bool [B, T], T of the longest and at least 1."""
    longest = max([1, *map(len, histories)])
    codes = np.zeros((len(histories), longest, levels), dtype=np.int64)
    mask = np.zeros((len(histories), longest), dtype=bool)
    for row, history in enumerate(histories):
        codes[row, : len(history)] = history
        mask[row, : len(history)] = True
    return codes, mask


def open_session(folder: Path, *, threads: int, device: int | None) -> ort.InferenceSession:
    """An ONNX Runtime session over a bundle's graph; UserError where it cannot be loaded."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin while they wait take the cores of a trainer on the same machine, and of each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    providers: list[str | tuple[str, dict[str, int]]] = ["CPUExecutionProvider"]
    if device is None:
        graph = folder / CPU_GRAPH_FILE
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        graph = folder / GRAPH_FILE
        providers.insert(0, (CUDA, {"device_id": device}))
    try:
        return ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(f"graph {graph} cannot be loaded: {error}") from None
