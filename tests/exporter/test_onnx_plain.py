"""The plain model answers with item ids, and its configuration is what Triton's ONNX Runtime backend reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from exporter.plain import export_plain, plain_config
from exporter.trie import build_trie
from onerec.errors import UserError
from trainer.beam import beam_search, trie_tensors
from trainer.config import ModelConfig
from trainer.model import OneRec

CONFIG = ModelConfig(
    d_model=16, heads=2, encoder_layers=1, decoder_layers=1, d_ff=24, experts=2, codes=4, levels=2, session_items=3
)
WIDTH = 10


@pytest.mark.slow
def test_the_plain_model_names_the_items_that_the_search_finds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OneRec(CONFIG).eval()
    codes = np.array([[1, 1], [0, 3], [1, 1], [2, 0], [1, 1]])
    ids = ["a", "b", "ünï", "d", "e"]
    trie = build_trie(codes, CONFIG.codes)
    export_plain(model.state_dict(), CONFIG, trie, ids, tmp_path / "onerec", width=WIDTH, templates=tmp_path / "templates")
    session = onnxruntime.InferenceSession(tmp_path / "onerec/1/model.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["history", "history_mask"]
    history, mask = np.array([[[1, 1], [0, 3]], [[2, 0], [0, 0]]]), np.array([[True, True], [True, False]])
    items, scores = session.run(["items", "scores"], {"history": history, "history_mask": mask})
    beams = beam_search(model, trie_tensors(trie), torch.from_numpy(history), torch.from_numpy(mask), width=WIDTH)
    np.testing.assert_allclose(scores, beams.scores.numpy(), atol=1e-4)
    names = np.array(ids, dtype=object)
    for user in range(2):
        alive = beams.alive[user].numpy()
        expected = names[trie.session_rows(beams.leaves[user].numpy()[alive])]
        assert items[user][alive].tolist() == expected.tolist()
        assert (items[user][~alive] == "").all()
    lines = [json.loads(line) for line in (tmp_path / "onerec/1/items.jsonl").read_text().splitlines()]
    assert lines == [{"item_id": name, "codes": code} for name, code in zip(ids, codes.tolist(), strict=True)]


def test_the_configuration_is_read_by_triton_s_own_message_type() -> None:
    parsed = text_format.Parse(plain_config(CONFIG, WIDTH, "onerec", 8), model_config_pb2.ModelConfig())
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("onerec", "onnxruntime", 8)
    assert {tensor.name: list(tensor.dims) for tensor in parsed.input} == {"history": [-1, 2], "history_mask": [-1]}
    assert {tensor.name: list(tensor.dims) for tensor in parsed.output} == {"items": [WIDTH, 3], "scores": [WIDTH]}


def test_item_ids_of_another_catalogue_are_refused(tmp_path: Path) -> None:
    trie = build_trie(np.array([[1, 1]]), CONFIG.codes)
    with pytest.raises(UserError, match="one catalogue"):
        export_plain({}, CONFIG, trie, ["a", "b"], tmp_path / "onerec", width=WIDTH, templates=tmp_path / "templates")
