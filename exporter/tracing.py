"""What every traced graph shares: parameters outside in one file, by name; nodes ready to be merged; a plan of a template."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

OPSET = 20
IR_VERSION = 10
WEIGHTS_FILE = "model.weights"
PAGE = 4096  # ONNX Runtime maps a weight in place only where it begins on a page
DYNAMIC = torch.export.Dim.DYNAMIC
_PREFIX = "model."


class WeightPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a parameter lies in the weights file: fp32, little-endian, row-major, `bytes` from `offset`."""

    name: str
    shape: list[int]
    offset: int
    bytes: int


class GraphPlan(NamedTuple):
    """What a template is made from: `settings` and the source of `code` decide the graph.

    `places` and `build` are called only when a template is made; tensors of `build`'s graph lie where `places` says.
    """

    settings: dict[str, Any]
    code: tuple[ModuleType, ...]
    inputs: list[str]
    outputs: list[str]
    places: Callable[[], list[WeightPlace]]
    build: Callable[[], onnx.ModelProto]


def place_weights(parameters: Mapping[str, Tensor]) -> list[WeightPlace]:
    """The weights file of a state dict: its parameters in their order, each on its own pages."""
    places, offset = [], 0
    for name, tensor in parameters.items():
        places.append(WeightPlace(name=name, shape=list(tensor.shape), offset=offset, bytes=4 * tensor.numel()))
        offset += -(-places[-1].bytes // PAGE) * PAGE
    return places


def references(places: list[WeightPlace]) -> list[TensorProto]:
    """All parameters as initializers that refer to the weights file."""
    tensors = []
    for place in places:
        tensor = TensorProto(name=place.name, data_type=TensorProto.FLOAT, dims=place.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS_FILE), ("offset", place.offset), ("length", place.bytes)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    return tensors


def trace(
    module: nn.Module, arguments: tuple, shapes: tuple, inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    """One ONNX graph by torch.export; not optimised, since the exporter's rewriter renames and merges weights.

    The parameters must belong to a submodule `model`; the graph comes without their data.
    """
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(), arguments, dynamo=True, optimize=False, opset_version=OPSET, dynamic_shapes=shapes,
                input_names=inputs, output_names=outputs, verbose=False,
            )  # fmt: skip
    finally:
        log.setLevel(level)
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    strange = [name for name in program.model.graph.initializers if not name.startswith(_PREFIX)]
    if strange:
        raise RuntimeError(f"the trace holds constants that are no parameters: {strange}")
    program.model.graph.initializers.clear()  # traced without data; `references` says where that lies
    return ir.serde.serialize_model(program.model)


def graph_nodes(proto: onnx.ModelProto, prefix: str, outer: dict[str, str]) -> list[onnx.NodeProto]:
    """The nodes of a trace, ready to be merged: values named after `prefix`, parameters as in the state dict.

    `outer` says what the trace's inputs are called in the surrounding graph, where they come from there.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in (*proto.graph.value_info, *proto.graph.input)}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            types[node.output[0]] = node.attribute[0].t.data_type
    nodes = list(proto.graph.node)
    for node in nodes:
        node.name = prefix + node.name
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        if node.op_type == "CastLike" and types.get(node.input[1]):  # ONNX Runtime folds Cast, but not CastLike
            node.op_type = "Cast"
            node.attribute.append(helper.make_attribute("to", types[node.input[1]]))
            del node.input[1]
        for side in (node.input, node.output):
            for index, name in enumerate(side):
                if name.startswith(_PREFIX):
                    side[index] = name.removeprefix(_PREFIX)
                elif name:
                    side[index] = outer.get(name, prefix + name)
    return nodes


def graph_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model of this project's opset around a graph."""
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="onerec")
