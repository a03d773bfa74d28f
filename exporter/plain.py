"""A model for Triton's own ONNX Runtime backend: the graph with weights, trie and item ids in it, and its `config.pbtxt`.

For those who want no Python in the server. What the model `recommend` does around the graph is then the caller's: the
history goes in as codes (`items.jsonl` has them), and a new catalogue needs a new export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from exporter.onnx_graph import search_plan
from exporter.trie import Trie, array_names
from exporter.weights import GRAPH_FILE, ensure_template, write_weights
from onerec.errors import Failure, UserError
from trainer.config import ModelConfig

ITEMS_FILE = "items.jsonl"


def export_plain(
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    trie: Trie,
    item_ids: Sequence[str],
    out_dir: Path,
    *,
    width: int,
    templates: Path,
    name: str = "onerec",
    max_batch: int = 8,
) -> None:
    """Write a model folder for a Triton repository: `config.pbtxt` and `1/{model.onnx, model.weights, items.jsonl}`.

    Inputs: history int64 [T, L], oldest first and right-padded, history_mask bool [T]. Outputs: items BYTES [W, m], best
    session first, "" in what no session fills; scores fp32 [W]. `item_ids` are in the order of the trie's rows.
    """
    if len(item_ids) != trie.items:
        raise UserError(f"{len(item_ids)} item ids for a trie of {trie.items} items: both must come from one catalogue")
    version = out_dir / "1"
    write_weights(state_dict, ensure_template(search_plan(config, width), templates), version)
    try:
        graph = onnx.load(version / GRAPH_FILE, load_external_data=False)
        bake(graph, trie, item_ids, width, config.session_items)
        (version / GRAPH_FILE).unlink()  # a link to the template, which must stay as it is
        (version / GRAPH_FILE).write_bytes(graph.SerializeToString())
        (version / ITEMS_FILE).write_bytes(_item_lines(trie, item_ids))
        (out_dir / "config.pbtxt").write_text(plain_config(config, width, name, max_batch))
    except OSError as error:
        raise Failure(f"cannot write the plain model to {out_dir}: {error}") from error


def bake(graph: onnx.ModelProto, trie: Trie, item_ids: Sequence[str], width: int, items: int) -> None:
    """Turn the trie inputs of `graph` into constants, and its output `leaves` into `items`, the item ids."""
    constants: dict[str, np.ndarray] = {
        **trie.arrays(),
        "plain/leaf_pointers": trie.leaf_pointers.astype(np.int64),
        "plain/leaf_rows": trie.leaf_rows.astype(np.int64),
        "plain/zero": np.array(0),
        "plain/last_row": np.array(trie.items - 1),
        "plain/axis2": np.array([2]),
        "plain/axis3": np.array([3]),
        "plain/diagonal": np.array(-1),
    }
    names = set(array_names(trie.levels))
    kept = [value for value in graph.graph.input if value.name not in names]
    del graph.graph.input[:]
    graph.graph.input.extend(kept)
    graph.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in constants.items())
    for key, strings in (("plain/item_ids", item_ids), ("plain/none", [""])):
        texts = TensorProto(name=key, data_type=TensorProto.STRING, dims=[len(strings)])
        texts.string_data.extend(text.encode() for text in strings)
        graph.graph.initializer.append(texts)
    # The r-th use of a leaf within a session is the r-th item of its list (`Trie.session_rows`).
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Max", ["leaves", "plain/zero"], "leaf", {}),
        ("Unsqueeze", ["plain/leaf", "plain/axis3"], "later", {}),
        ("Unsqueeze", ["plain/leaf", "plain/axis2"], "earlier", {}),
        ("Equal", ["plain/later", "plain/earlier"], "same", {}),
        ("Cast", ["plain/same"], "same_number", {"to": TensorProto.INT64}),
        ("Trilu", ["plain/same_number", "plain/diagonal"], "before", {"upper": 0}),
        ("ReduceSum", ["plain/before", "plain/axis3"], "use", {"keepdims": 0}),
        ("Gather", ["plain/leaf_pointers", "plain/leaf"], "first", {}),
        ("Add", ["plain/first", "plain/use"], "place", {}),
        ("Min", ["plain/place", "plain/last_row"], "legal_place", {}),
        ("Gather", ["plain/leaf_rows", "plain/legal_place"], "row", {}),
        ("Gather", ["plain/item_ids", "plain/row"], "name", {}),
        ("Less", ["leaves", "plain/zero"], "dead", {}),
    ]
    for operator, inputs, output, attributes in steps:
        node = helper.make_node(operator, inputs, [f"plain/{output}"], name=f"plain/{output}", **attributes)
        graph.graph.node.append(node)
    graph.graph.node.append(
        helper.make_node("Where", ["plain/dead", "plain/none", "plain/name"], ["items"], name="plain/items")
    )
    scores = [value for value in graph.graph.output if value.name == "scores"]
    del graph.graph.output[:]
    graph.graph.output.append(helper.make_tensor_value_info("items", TensorProto.STRING, ["batch", width, items]))
    graph.graph.output.extend(scores)


def plain_config(config: ModelConfig, width: int, name: str, max_batch: int) -> str:
    """`config.pbtxt` for the backend `onnxruntime`."""
    return f"""name: "{name}"
backend: "onnxruntime"
max_batch_size: {max_batch}
input {{ name: "history" data_type: TYPE_INT64 dims: [ -1, {config.levels} ] }}
input {{ name: "history_mask" data_type: TYPE_BOOL dims: [ -1 ] }}
output {{ name: "items" data_type: TYPE_STRING dims: [ {width}, {config.session_items} ] }}
output {{ name: "scores" data_type: TYPE_FP32 dims: [ {width} ] }}
instance_group {{ count: 1 }}
dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
"""


def _item_lines(trie: Trie, item_ids: Sequence[str]) -> bytes:
    leaf_of = np.empty(trie.items, dtype=np.int64)
    leaf_of[trie.leaf_rows] = np.repeat(np.arange(trie.leaves), np.diff(trie.leaf_pointers))
    encode = msgspec.json.Encoder().encode
    codes = trie.tuples[leaf_of].tolist()
    return b"".join(
        encode({"item_id": item_id, "codes": code}) + b"\n" for item_id, code in zip(item_ids, codes, strict=True)
    )
