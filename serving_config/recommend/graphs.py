"""ONNX graphs of a bundle: opened on a device, and histories made ready for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onerec.errors import UserError

GRAPH_FILE = "model.onnx"
CPU_GRAPH_FILE = "model.cpu.onnx"
"""The same graph as ONNX Runtime optimised it for the CPU: loads in half the time."""

CUDA = "CUDAExecutionProvider"

Place = tuple[str, int]
"""Device kind and number, as OrtValue takes them."""


def open_graph(folder: Path, *, threads: int, device: int | None) -> tuple[ort.InferenceSession, Place]:
    """A graph's session, and where its inputs go; the CPU where CUDA cannot be used, with a line on standard error.

    `threads` are ONNX Runtime's within an operator, `device` a CUDA device id or None. UserError where it cannot be loaded.
    """
    session = open_session(folder, threads=threads, device=device)
    if device is None:
        return session, ("cpu", 0)
    if CUDA in session.get_providers():
        return session, ("cuda", device)
    # ONNX Runtime itself would go on without a word, with the graph that is slow on the CPU.
    sys.stderr.write("onerec: ONNX Runtime cannot use CUDA here (see its words above); running on the CPU\n")
    return open_session(folder, threads=threads, device=None), ("cpu", 0)


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


def pad(histories: Sequence[NDArray[np.int64]], levels: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ragged histories, each [T, L], as codes int64 [B, T, L] and mask bool [B, T], T of the longest and at least 1."""
    longest = max([1, *map(len, histories)])
    codes = np.zeros((len(histories), longest, levels), dtype=np.int64)
    mask = np.zeros((len(histories), longest), dtype=bool)
    for row, history in enumerate(histories):
        codes[row, : len(history)] = history
        mask[row, : len(history)] = True
    return codes, mask
