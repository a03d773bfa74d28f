"""Small bundles for tests of the serving end: hand-made graphs with the real ones' inputs and outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter import bundle
from exporter.export import Expected
from exporter.publish import Build
from exporter.trie import array_names, build_trie
from trainer.config import ModelConfig, RewardConfig, RewardModelConfig
from trainer.reward_weights import combine_array

MODEL = ModelConfig(codes=8, levels=3, session_items=3, history_length=6, d_model=16, heads=2, d_ff=16)
WIDTH = 5
REWARD = RewardModelConfig(codes=8, levels=3, session_items=3, history_length=4, dimension=8, heads=2, buckets=8)
TOWERS = (3, 5, 7, 11)
MODULUS = 13


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


def write_reward_graph(folder: Path) -> None:
    """A graph whose reward t of a session is ((sum of its codes + of the history's) · TOWERS[t] mod MODULUS) / MODULUS."""
    folder.mkdir(parents=True)
    names = {"two": np.array([2]), "user_axes": np.array([1, 2]), "session_axes": np.array([2, 3]),
             "towers": np.array(TOWERS), "modulus": np.array(MODULUS), "modulus_f": np.array(MODULUS, np.float32),
             "last": np.array([2])}  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["history_mask"], ["mask"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["mask", "two"], ["mask3"]),
        helper.make_node("Mul", ["history", "mask3"], ["real"]),
        helper.make_node("ReduceSum", ["real", "user_axes"], ["user3"], keepdims=1),
        helper.make_node("Squeeze", ["user3", "two"], ["user"]),
        helper.make_node("Cast", ["session_mask"], ["session_real"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["session_real", "three"], ["session_real4"]),
        helper.make_node("Mul", ["sessions", "session_real4"], ["codes"]),
        helper.make_node("ReduceSum", ["codes", "session_axes"], ["session"], keepdims=0),
        helper.make_node("Add", ["session", "user"], ["both"]),
        helper.make_node("Unsqueeze", ["both", "last"], ["both3"]),
        helper.make_node("Mul", ["both3", "towers"], ["products"]),
        helper.make_node("Mod", ["products", "modulus"], ["rest"]),
        helper.make_node("Cast", ["rest"], ["rest_f"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["rest_f", "modulus_f"], ["rewards"]),
    ]
    m, levels = MODEL.session_items, MODEL.levels
    inputs = [
        helper.make_tensor_value_info("history", TensorProto.INT64, ["B", "T", levels]),
        helper.make_tensor_value_info("history_mask", TensorProto.BOOL, ["B", "T"]),
        helper.make_tensor_value_info("sessions", TensorProto.INT64, ["B", "W", m, levels]),
        helper.make_tensor_value_info("session_mask", TensorProto.BOOL, ["B", "W", m]),
    ]
    outputs = [helper.make_tensor_value_info("rewards", TensorProto.FLOAT, ["B", "W", len(TOWERS)])]
    constants = {**names, "three": np.array([3])}
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "fake_rewards", inputs, outputs, initializers)
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
    reward: RewardConfig | None = None,
) -> bundle.Manifest:
    """A sealed bundle in `folder` around the hand-made graph; `reward`: with a reward model, its towers weighted so."""
    catalogue = catalogue or FakeCatalogue()
    folder.mkdir(parents=True)
    write_graph(folder / bundle.GRAPH_FOLDER, shift=shift, alive=alive)
    snapshot = bundle.write_catalogue(folder, catalogue, MODEL.codes)
    bundle.copy_runtime(folder)
    part = None
    if reward is not None:
        write_reward_graph(folder / bundle.REWARD_FOLDER)
        parity = bundle.RewardParity(histories=0, sessions=0, difference=0.0)
        part = bundle.RewardPart(config=REWARD, weights=reward, parity=parity)
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
        reward=part,
    )
    bundle.write_manifest(folder, manifest)
    return manifest


def as_format_1(folder: Path) -> None:
    """Give a bundle the manifest that was written before bundles held reward models."""
    path = folder / bundle.MANIFEST_FILE
    record = msgspec.json.decode(path.read_bytes())
    del record["reward"], record["sha256"]
    record["format"] = 1
    record["sha256"] = hashlib.sha256(msgspec.json.encode(record, order="deterministic")).hexdigest()
    path.write_bytes(msgspec.json.encode(record))


def builder(
    *,
    watermark: int | None = 1_000,
    spoil: Callable[[Path], None] | None = None,
    reward: RewardConfig | None = None,
) -> Build:
    """A `build` for `publish_bundle`: the hand-made bundle whose shift is its version, so that the answer tells it.

    `reward` as for `make_bundle`; `spoil` is called with the sealed folder, to damage it.
    """

    def build(folder: Path, version: int) -> tuple[bundle.Manifest, Expected]:
        folder.rmdir()
        manifest = make_bundle(folder, version, shift=version, watermark=watermark, reward=reward)
        if spoil:
            spoil(folder)
        by_reward = [expected_choice(version, (), reward)[0][0]] if reward else []
        return manifest, Expected(history=[], sessions=[expected_session(version)], by_reward=by_reward)

    return build


def expected_session(shift: int, history: tuple[str, ...] = (), beam: int = 0) -> list[str]:
    """Item ids that the hand-made graph answers for known items of the catalogue."""
    catalogue = FakeCatalogue()
    trie = build_trie(catalogue.item_codes, MODEL.codes)
    total = sum(int(catalogue.item_codes[catalogue.item_ids.index(item)].sum()) for item in history)
    m = MODEL.session_items
    leaves = (total + shift + beam * m + np.arange(m)) % trie.leaves
    return [catalogue.item_ids[row] for row in trie.session_rows(leaves)]


def expected_rewards(session: list[str], history: tuple[str, ...] = ()) -> list[float]:
    """What the hand-made reward graph gives: the newest `REWARD.history_length` items of the history are read."""
    catalogue = FakeCatalogue()

    def total(items: list[str]) -> int:
        return sum(int(catalogue.item_codes[catalogue.item_ids.index(item)].sum()) for item in items)

    both = total(session) + total(list(history[-REWARD.history_length :]))
    return [both * tower % MODULUS / MODULUS for tower in TOWERS]


def expected_choice(
    shift: int, history: tuple[str, ...], weights: RewardConfig
) -> list[tuple[list[str], list[float], int]]:
    """All beams as (session, rewards, beam), by falling combined reward, of equals the likelier first."""
    beams = [expected_session(shift, history, beam) for beam in range(WIDTH)]
    rewards = [expected_rewards(session, history) for session in beams]
    combined = [float(combine_array(np.array(each, np.float32), weights)) for each in rewards]
    order = sorted(range(WIDTH), key=lambda beam: (-combined[beam], beam))
    return [(beams[beam], rewards[beam], beam) for beam in order]


def set_aside(repository: Path, version: int) -> str:
    """The reason beside a version that was set aside."""
    return (repository / ".onerec" / "rejected" / str(version) / "reason.txt").read_text()
