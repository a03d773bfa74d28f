"""Small bundles for tests of the serving end: a hand-made graph with the beam graph's inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter import bundle
from exporter.export import Expected
from exporter.publish import Build
from exporter.trie import array_names, build_trie
from trainer.config import ModelConfig

MODEL = ModelConfig(codes=8, levels=3, session_items=3, history_length=6, d_model=16, heads=2, d_ff=16)
WIDTH = 5


@dataclass
class FakeCatalogue:
    """Twenty items, some of one triple."""

    version: str = "book-1"
    revision: str = "rev-1"
    item_ids: list[str] = field(default_factory=lambda: [f"v{n}" for n in range(20)])
    tags: list[list[str]] = field(default_factory=lambda: [[f"tag{n % 3}"] for n in range(20)])

    @property
    def item_codes(self) -> np.ndarray:
        numbers = np.arange(len(self.item_ids)) // 2
        return np.stack([numbers % 8, numbers // 2 % 8, numbers * 3 % 8], axis=1).astype(np.int32)


def write_graph(folder: Path, *, shift: int = 0, width: int = WIDTH, alive: int = WIDTH) -> None:
    """A graph whose beam w, item i is leaf (sum of real history codes + shift + w·m + i) mod D, with score -w - 1.

    Beams from `alive` on are dead: leaves -1, score -6e4.
    """
    folder.mkdir(parents=True, exist_ok=True)
    m, levels = MODEL.session_items, MODEL.levels
    grid = np.arange(width * m, dtype=np.int64).reshape(1, width, m)
    dead = (np.arange(width) >= alive).reshape(1, width)
    scores = np.where(dead, -6e4, -np.arange(width) - 1.0).astype(np.float32)

    def constant(name: str, value: np.ndarray) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(value), name)

    nodes = [
        helper.make_node("Cast", ["history_mask"], ["mask"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["mask", "two"], ["mask3"]),
        helper.make_node("Mul", ["history", "mask3"], ["real"]),
        helper.make_node("ReduceSum", ["real", "sum_axes"], ["total"], keepdims=1),
        helper.make_node("Add", ["total", "grid"], ["numbers"]),
        helper.make_node("Shape", ["ancestor0"], ["leaf_count"]),
        helper.make_node("Mod", ["numbers", "leaf_count"], ["legal"]),
        helper.make_node("Where", ["dead", "minus_one", "legal"], ["leaves"]),
        helper.make_node("Mul", ["total", "zero"], ["nothing"]),
        helper.make_node("Squeeze", ["nothing", "two"], ["nothing2"]),
        helper.make_node("Cast", ["nothing2"], ["nothing_f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["nothing_f", "score_row"], ["scores"]),
    ]
    inputs = [
        helper.make_tensor_value_info("history", TensorProto.INT64, ["B", "T", levels]),
        helper.make_tensor_value_info("history_mask", TensorProto.BOOL, ["B", "T"]),
        *(helper.make_tensor_value_info(name, TensorProto.INT32, [name]) for name in array_names(levels)),
    ]
    outputs = [
        helper.make_tensor_value_info("leaves", TensorProto.INT64, ["B", width, m]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", width]),
    ]
    initializers = [
        constant("two", np.array([2])),
        constant("sum_axes", np.array([1, 2])),
        constant("grid", grid + shift),
        constant("dead", dead[..., None]),
        constant("minus_one", np.array(-1)),
        constant("zero", np.array(0)),
        constant("score_row", scores),
    ]
    graph = helper.make_graph(nodes, "fake", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    for name in ("model.onnx", "model.cpu.onnx"):
        onnx.save(model, folder / name)


def make_bundle(
    folder: Path,
    version: int = 1,
    *,
    shift: int = 0,
    alive: int = WIDTH,
    watermark: int | None = 1_000,
    catalogue: FakeCatalogue | None = None,
) -> bundle.Manifest:
    """A sealed bundle in `folder` around the hand-made graph."""
    catalogue = catalogue or FakeCatalogue()
    folder.mkdir(parents=True)
    write_graph(folder / bundle.GRAPH_FOLDER, shift=shift, alive=alive)
    snapshot = bundle.write_catalogue(folder, catalogue, MODEL.codes)
    bundle.copy_runtime(folder)
    manifest = bundle.Manifest(
        version=version,
        codebook_version=catalogue.version,
        catalogue_revision=catalogue.revision,
        items=len(catalogue.item_ids),
        leaves=snapshot.trie.leaves,
        watermark=watermark,
        step=version * 10,
        model_config=MODEL,
        width=WIDTH,
        created_ms=1_700_000_000_000,
        parity=bundle.Parity(histories=0, sessions=0, score_difference=0.0),
        files=bundle.digest_files(folder),
    )
    bundle.write_manifest(folder, manifest)
    return manifest


def builder(*, watermark: int | None = 1_000, spoil: Callable[[Path], None] | None = None) -> Build:
    """A `build` for `publish_bundle`: the hand-made bundle whose shift is its version, so that the answer tells it.

    `spoil` is called with the sealed folder, to damage it.
    """

    def build(folder: Path, version: int) -> tuple[bundle.Manifest, Expected]:
        folder.rmdir()
        manifest = make_bundle(folder, version, shift=version, watermark=watermark)
        if spoil:
            spoil(folder)
        return manifest, Expected(history=[], sessions=[expected_session(version)])

    return build


def expected_session(shift: int, history: tuple[str, ...] = (), beam: int = 0) -> list[str]:
    """Item ids that the hand-made graph answers for known items of the catalogue."""
    catalogue = FakeCatalogue()
    trie = build_trie(catalogue.item_codes, MODEL.codes)
    total = sum(int(catalogue.item_codes[catalogue.item_ids.index(item)].sum()) for item in history)
    m = MODEL.session_items
    leaves = (total + shift + beam * m + np.arange(m)) % trie.leaves
    return [catalogue.item_ids[row] for row in trie.session_rows(leaves)]


def set_aside(repository: Path, version: int) -> str:
    """The reason beside a version that was set aside."""
    return (repository / ".onerec" / "rejected" / str(version) / "reason.txt").read_text()
