"""The beam search as one ONNX graph: encoder, first item, and a `Loop` over the other items (paper §3.2, §4).

`trainer.beam` is traced twice, as "first item" and "next item"; the second trace becomes the body of the Loop and reads
weights, trie and encoded history from the graph around it. Every parameter keeps its name and shape as an initializer.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial
from typing import Any

import msgspec
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import exporter.tracing
import exporter.trie
import trainer.attention
import trainer.beam
import trainer.model
import trainer.moe
import trainer.norm
from exporter.tracing import DYNAMIC, GraphPlan, WeightPlace, graph_model, graph_nodes, place_weights, references, trace
from exporter.trie import array_names
from trainer.beam import SENTINEL, Memory, State, first_item, next_item
from trainer.config import ModelConfig
from trainer.model import OneRec, PositionBias

INPUTS = ("history", "history_mask")
_USERS = 3


class _First(nn.Module):
    """Traced as the head of the graph."""

    def __init__(self, model: OneRec, width: int, constrained: bool) -> None:
        super().__init__()
        self.model, self.width, self.constrained = model, width, constrained

    def forward(self, history: Tensor, history_mask: Tensor, trie: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        arrays = _named(self.model.config.levels, trie) if self.constrained else None
        state, memory = first_item(self.model, arrays, history, history_mask, width=self.width)
        return (*_state_out(state, self.width), *(part for pair in memory.cross_kv for part in pair), memory.mask)


class _Next(nn.Module):
    """Traced as the body of the Loop."""

    def __init__(self, model: OneRec, width: int, constrained: bool) -> None:
        super().__init__()
        self.model, self.width, self.constrained = model, width, constrained

    def forward(
        self,
        state: tuple[Tensor, ...],
        cross: tuple[Tensor, ...],
        mask: Tensor,
        trie: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        arrays = _named(self.model.config.levels, trie) if self.constrained else None
        scores, written, last, *cache = state
        pairs = _pairs([part.flatten(0, 1) for part in cache])
        state_in = State(scores, written, last, pairs)
        return _state_out(next_item(self.model, arrays, state_in, Memory(_pairs(list(cross)), mask)), self.width)


def search_plan(config: ModelConfig, width: int) -> GraphPlan:
    """The template of the search of an architecture with `width` beams."""
    code = (
        sys.modules[__name__],
        exporter.tracing,
        exporter.trie,
        trainer.attention,
        trainer.beam,
        trainer.model,
        trainer.moe,
        trainer.norm,
    )
    return GraphPlan(
        settings={"search": msgspec.to_builtins(config), "width": width},
        code=code,
        inputs=[*INPUTS, *array_names(config.levels)],
        outputs=["leaves", "scores"],
        places=partial(layout, config),
        build=partial(build_graph, config, width),
    )


def layout(config: ModelConfig) -> list[WeightPlace]:
    """The weights file of an architecture: parameters in the order of `OneRec.state_dict()`, each on its own pages."""
    with torch.device("meta"):
        parameters = OneRec(config).state_dict()
    return place_weights(parameters)


def build_graph(config: ModelConfig, width: int, *, constrained: bool = True) -> onnx.ModelProto:
    """The search of `config.session_items` items with `width` beams; its weights lie in a file, as `layout` says.

    Inputs: history int64 [B, T, L], history_mask bool [B, T], and the arrays of `exporter.trie.array_names`, int32.
    Outputs: leaves int64 [B, W, m] (-1 where dead), scores fp32 [B, W]. Not constrained, for comparison: no trie inputs,
    and codes int64 [B, W, m·L] instead of leaves. Initializers have the names of `OneRec.state_dict()`.
    """
    with FakeTensorMode():  # shapes only: tracing 1B parameters takes no more memory than tracing a million
        model = OneRec(config).eval()
    names = array_names(config.levels) if constrained else []
    carried, memory = _state_names(config), _memory_names(config)
    arguments, shapes = _first_example(config, constrained)
    module = _First(model, width, constrained)
    proto = trace(module, arguments, shapes, [*INPUTS, *names], [*carried, *memory])
    arrays = {name: name for name in names}
    nodes = graph_nodes(proto, "first/", arrays | {name: name for name in INPUTS})
    state = [f"first/{name}" for name in carried]
    if config.session_items > 1:
        arguments, shapes = _next_example(config, width, constrained)
        outputs = [f"{name}_out" for name in carried]
        proto = trace(_Next(model, width, constrained), arguments, shapes, [*carried, *memory, *names], outputs)
        body = graph_nodes(proto, "next/", arrays | {name: f"first/{name}" for name in memory})
        nodes = [*nodes, *_loop(body, config, width, state)]
        state = [f"last/{name}" for name in carried]
    nodes = [*nodes, *_finish(state, constrained)]
    inputs, results = _inputs(config, names), _outputs(config, width, constrained)
    merged = helper.make_graph(nodes, "onerec_beam_search", inputs, results, _initializers(config))
    return graph_model(merged)


def _initializers(config: ModelConfig) -> list[TensorProto]:
    """All parameters as references into the weights file, and the position buckets, which are no weights, as they are."""
    tensors = references(layout(config))
    for name, bidirectional in (("encoder_bias", True), ("decoder_bias", False)):
        buckets = PositionBias(config, bidirectional=bidirectional).bucket_of
        tensors.append(numpy_helper.from_array(buckets.numpy(), f"{name}.bucket_of"))
    return tensors


def _loop(body: list[onnx.NodeProto], config: ModelConfig, width: int, state: list[str]) -> list[onnx.NodeProto]:
    """The nodes that run `body` session_items - 1 times over `state`, leaving it under `last/…`."""
    step = helper.make_tensor_value_info("next/step", TensorProto.INT64, [])
    go_on = helper.make_tensor_value_info("next/go_on", TensorProto.BOOL, [])
    go_on_out = helper.make_tensor_value_info("next/go_on_out", TensorProto.BOOL, [])
    keep = helper.make_node("Identity", [go_on.name], [go_on_out.name], name="next/keep_going")
    inputs = _state_infos(config, width, "next/", "")
    outputs = _state_infos(config, width, "next/", "_out")
    graph = helper.make_graph([*body, keep], "next_item", [step, go_on, *inputs], [go_on_out, *outputs])
    trips = helper.make_tensor("trips", TensorProto.INT64, [], [config.session_items - 1])
    return [
        helper.make_node("Constant", [], ["trips"], name="trips", value=trips),
        helper.make_node(
            "Loop", ["trips", "", *state], [f"last/{name}" for name in _state_names(config)], name="items", body=graph
        ),
    ]


def _finish(state: list[str], constrained: bool) -> list[onnx.NodeProto]:
    """`trainer.beam.finish`: what is dead becomes leaf -1 and SENTINEL."""
    scores, written = state[:2]
    if not constrained:
        return [
            helper.make_node("Identity", [written], ["codes"], name="finish/codes"),
            helper.make_node("Identity", [scores], ["scores"], name="finish/scores"),
        ]
    constants = {
        "finish/sentinel": helper.make_tensor("sentinel", TensorProto.FLOAT, [], [SENTINEL]),
        "finish/none": helper.make_tensor("none", TensorProto.INT64, [], [-1]),
        "finish/axis": helper.make_tensor("axis", TensorProto.INT64, [1], [2]),
    }
    return [
        *(helper.make_node("Constant", [], [name], name=name, value=value) for name, value in constants.items()),
        helper.make_node("Greater", [scores, "finish/sentinel"], ["finish/alive"], name="finish/alive"),
        helper.make_node("Unsqueeze", ["finish/alive", "finish/axis"], ["finish/alive_beam"], name="finish/alive_beam"),
        helper.make_node("Where", ["finish/alive_beam", written, "finish/none"], ["leaves"], name="finish/leaves"),
        helper.make_node("Where", ["finish/alive", scores, "finish/sentinel"], ["scores"], name="finish/scores"),
    ]


def _example_trie(config: ModelConfig) -> dict[str, Tensor]:
    """Trie arrays to trace with: only their sizes matter, and each is its own, so that no two are frozen as equal."""
    free = itertools.count(101, 2)
    fixed = {"capacity0": config.codes, "pointers1": config.codes + 1, "leaf0": config.codes}
    names = array_names(config.levels)
    return {name: torch.zeros(fixed.get(name) or next(free), dtype=torch.int32) for name in names}


def _trie_shapes(config: ModelConfig) -> tuple[dict[int, Any], ...]:
    fixed = ("capacity0", "pointers1", "leaf0")
    return tuple({} if name in fixed else {0: DYNAMIC} for name in array_names(config.levels))


def _first_example(config: ModelConfig, constrained: bool) -> tuple[tuple, tuple]:
    """Arguments and dynamic shapes of `_First`."""
    users, items = _USERS, 5
    history = torch.zeros(users, items, config.levels, dtype=torch.int64)
    mask = torch.ones(users, items, dtype=torch.bool)
    arrays = tuple(_example_trie(config).values()) if constrained else ()
    free = {0: DYNAMIC, 1: DYNAMIC}
    return (history, mask, arrays), (free, free, _trie_shapes(config) if constrained else ())


def _next_example(config: ModelConfig, width: int, constrained: bool) -> tuple[tuple, tuple]:
    """Arguments and dynamic shapes of `_Next`: two items are written, the history has nine positions."""
    heads, deep = config.heads, config.d_model // config.heads
    past, positions = 2 * (config.levels + 1) - 1, 9
    written = 2 if constrained else 2 * config.levels
    state = (
        torch.zeros(_USERS, width),
        torch.zeros(_USERS, width, written, dtype=torch.int64),
        torch.zeros(_USERS, width, dtype=torch.int64),
        *(torch.zeros(_USERS, width, heads, past, deep) for _ in range(2 * config.decoder_layers)),
    )
    cross = tuple(torch.zeros(_USERS, heads, positions, deep) for _ in range(2 * config.decoder_layers))
    mask = torch.ones(_USERS, positions, dtype=torch.bool)
    arrays = tuple(_example_trie(config).values()) if constrained else ()
    batch: dict[int, Any] = {0: DYNAMIC}
    state_shapes = (batch, {0: DYNAMIC, 2: DYNAMIC}, batch, *({0: DYNAMIC, 3: DYNAMIC} for _ in state[3:]))
    cross_shapes = tuple({0: DYNAMIC, 2: DYNAMIC} for _ in cross)
    return (
        (state, cross, mask, arrays),
        (state_shapes, cross_shapes, {0: DYNAMIC, 1: DYNAMIC}, _trie_shapes(config) if constrained else ()),
    )


def _named(levels: int, arrays: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(array_names(levels), arrays, strict=True))


def _pairs(parts: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(parts[::2], parts[1::2], strict=True))


def _state_out(state: State, width: int) -> tuple[Tensor, ...]:
    cache = (part.unflatten(0, (-1, width)) for pair in state.cache for part in pair)
    return (state.scores, state.written, state.last, *cache)


def _state_names(config: ModelConfig) -> list[str]:
    cache = [f"{part}{layer}" for layer in range(config.decoder_layers) for part in ("key", "value")]
    return ["scores", "written", "token", *cache]


def _memory_names(config: ModelConfig) -> list[str]:
    cross = [f"cross_{part}{layer}" for layer in range(config.decoder_layers) for part in ("key", "value")]
    return [*cross, "memory_mask"]


def _state_infos(config: ModelConfig, width: int, prefix: str, suffix: str) -> list[onnx.ValueInfoProto]:
    """Types of the Loop's state; the unknown sizes have no names, for they change from one turn to the next."""
    cache = (TensorProto.FLOAT, [None, width, config.heads, None, config.d_model // config.heads])
    types = [
        (TensorProto.FLOAT, [None, width]),
        (TensorProto.INT64, [None, width, None]),
        (TensorProto.INT64, [None, width]),
        *[cache] * (2 * config.decoder_layers),
    ]
    return [
        helper.make_tensor_value_info(f"{prefix}{name}{suffix}", kind, shape)
        for name, (kind, shape) in zip(_state_names(config), types, strict=True)
    ]


def _inputs(config: ModelConfig, names: list[str]) -> list[onnx.ValueInfoProto]:
    fixed = {"capacity0": config.codes, "pointers1": config.codes + 1, "leaf0": config.codes}
    return [
        helper.make_tensor_value_info("history", TensorProto.INT64, ["batch", "items", config.levels]),
        helper.make_tensor_value_info("history_mask", TensorProto.BOOL, ["batch", "items"]),
        *(helper.make_tensor_value_info(name, TensorProto.INT32, [fixed.get(name, name)]) for name in names),
    ]


def _outputs(config: ModelConfig, width: int, constrained: bool) -> list[onnx.ValueInfoProto]:
    items = config.session_items
    written = ("leaves", [None, width, items]) if constrained else ("codes", [None, width, items * config.levels])
    return [
        helper.make_tensor_value_info(written[0], TensorProto.INT64, ["batch", *written[1][1:]]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", width]),
    ]
