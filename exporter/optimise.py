"""ONNX Runtime's own optimisations of a template, done once instead of at every load; weights stay outside, by name.

A graph optimised here loads in a fraction of the time. Constant folding is left off: it would bake weights into new
constants. What is fused is chosen for the CPU, so the unoptimised graph stays beside it for other devices.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, external_data_helper, numpy_helper

from exporter.tracing import PAGE, WEIGHTS_FILE, WeightPlace
from exporter.weights import GRAPH_FILE, TEMPLATE_GRAPH, Template, load_template
from onerec.errors import Failure

CPU_TEMPLATE = "template.cpu.onnx"
SCRATCH_PREFIX = ".optimise-"
CONSTANTS_FILE = "constants.bin"


def ensure_cpu_graph(template_dir: Path) -> Path:
    """The optimised graph of a template, made where it is not there yet; whole or not at all.

    It refers to the same `model.weights`, by the same names and offsets. Raises Failure where ONNX Runtime dropped a
    weight or changed its shape, so that the layout no longer fits.
    """
    target = template_dir / CPU_TEMPLATE
    if target.exists():
        return target
    template = load_template(template_dir)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=template_dir) as scratch:
        folder = Path(scratch)
        os.link(template_dir / TEMPLATE_GRAPH, folder / GRAPH_FILE)
        _write_example_weights(template, folder / WEIGHTS_FILE)
        optimised = _optimise(folder)
        places = {place.name: place for place in template.weights}
        if dropped := places.keys() - {tensor.name for tensor in _initializers(optimised.graph)}:
            raise Failure(f"ONNX Runtime {ort.__version__} dropped the weights {sorted(dropped)} while optimising; report this")
        for tensor in _initializers(optimised.graph):
            _settle(tensor, places, folder)
        fresh = folder / CPU_TEMPLATE
        fresh.write_bytes(optimised.SerializeToString())
        fresh.rename(target)
    return target


def _write_example_weights(template: Template, path: Path) -> None:
    """Weights of the right size, no two alike: ONNX Runtime merges equal ones and drops a bias that is 0.

    A page of each is enough to tell them apart; the rest of the file stays a hole.
    """
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.truncate(template.weight_bytes)
        for place in template.weights:
            file.seek(place.offset)
            file.write(rng.uniform(1, 2, min(place.bytes, PAGE) // 4).astype("<f4").tobytes())


def _optimise(folder: Path) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", CONSTANTS_FILE)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    ort.InferenceSession(
        folder / GRAPH_FILE, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
    return onnx.load(folder / "optimised.onnx", load_external_data=False)


def _initializers(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Initializers of a graph and of the bodies in it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _initializers(attribute.g)


def _settle(tensor: TensorProto, places: dict[str, WeightPlace], folder: Path) -> None:
    """Point a weight at its place in `model.weights`; take any other constant into the graph."""
    place = places.get(tensor.name)
    if place is None:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor, str(folder)), tensor.name))
        return
    if tensor.data_type != TensorProto.FLOAT or list(tensor.dims) != list(place.shape):
        raise Failure(
            f"ONNX Runtime {ort.__version__} changed the weight {place.name} to {list(tensor.dims)} while optimising; "
            "report this with the version"
        )
    tensor.raw_data = b""  # what set_external_data wants to see
    external_data_helper.set_external_data(tensor, WEIGHTS_FILE, place.offset, place.bytes)
    tensor.ClearField("raw_data")
