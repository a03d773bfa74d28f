"""The exported graph gives the sessions of the torch search, in its order, whatever comes in; weights alone make a version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from exporter.onnx_graph import search_plan
from exporter.trie import Trie, build_trie
from exporter.weights import GRAPH_FILE, Template, ensure_template, load_template, template_key, write_weights
from onerec.errors import Failure, UserError
from trainer.beam import beam_search, trie_tensors
from trainer.config import ModelConfig
from trainer.model import OneRec

WIDTH = 12
CODES = 16
SHAPES = {
    "item": ModelConfig(
        d_model=16, heads=2, encoder_layers=1, decoder_layers=2, d_ff=24, experts=3, codes=CODES, session_items=3
    ),
    "code": ModelConfig(
        d_model=16, heads=2, encoder_layers=1, decoder_layers=1, d_ff=24, experts=3, codes=CODES, levels=2,
        session_items=2, history_tokens="code",
    ),
    "next item, one level": ModelConfig(
        d_model=16, heads=2, encoder_layers=1, decoder_layers=1, d_ff=24, experts=1, top_k=1, codes=CODES, levels=1,
        session_items=1,
    ),
    "items of one level": ModelConfig(
        d_model=16, heads=2, encoder_layers=1, decoder_layers=1, d_ff=24, experts=2, codes=8, levels=1, session_items=3
    ),
}  # fmt: skip


def make_model(config: ModelConfig, seed: int = 0) -> OneRec:
    model = OneRec(config)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for head in model.level_head:
            head.mul_(10)
        for bias in (model.encoder_bias, model.decoder_bias):
            bias.table.normal_(generator=torch.Generator().manual_seed(seed))
    return model.eval()


def load(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / GRAPH_FILE, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="session")
def template_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the template of a shape once."""
    folder = tmp_path_factory.mktemp("templates")
    return lambda name: ensure_template(search_plan(SHAPES[name], WIDTH), folder)


@pytest.fixture(scope="session")
def served(
    template_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[OneRec, onnxruntime.InferenceSession]]:
    """A model and its loaded graph."""
    loaded: dict[str, tuple[OneRec, onnxruntime.InferenceSession]] = {}

    def get(name: str) -> tuple[OneRec, onnxruntime.InferenceSession]:
        if name not in loaded:
            model, folder = make_model(SHAPES[name]), tmp_path_factory.mktemp("version")
            write_weights(model.state_dict(), template_of(name), folder)
            loaded[name] = model, load(folder)
        return loaded[name]

    return get


def catalogue(config: ModelConfig, items: int, seed: int = 0) -> Trie:
    return build_trie(np.random.default_rng(seed).integers(0, config.codes, (items, config.levels)), config.codes)


def histories(config: ModelConfig, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    size = max(1, *lengths)
    codes = np.random.default_rng(seed).integers(0, config.codes, (len(lengths), size, config.levels))
    return torch.from_numpy(codes), torch.arange(size) < torch.tensor(lengths).unsqueeze(1)


def assert_same_sessions(
    model: OneRec, session: onnxruntime.InferenceSession, trie: Trie, history: Tensor, mask: Tensor
) -> np.ndarray:
    """Both give the same live beams; returns the leaves."""
    feed = {"history": history.numpy(), "history_mask": mask.numpy(), **trie.arrays()}
    leaves, scores = session.run(["leaves", "scores"], feed)
    expected = beam_search(model, trie_tensors(trie), history, mask, width=WIDTH)
    np.testing.assert_array_equal(leaves, expected.leaves.numpy())
    np.testing.assert_allclose(scores, expected.scores.numpy(), rtol=0, atol=1e-4)
    return leaves


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[1], [0], [3, 0, 7], [40, 1], [2] * 9])
def test_torch_and_onnx_runtime_give_the_same_sessions_in_the_same_order(
    served: Callable, shape: str, lengths: list[int]
) -> None:
    model, session = served(shape)
    trie = catalogue(model.config, items=300)
    leaves = assert_same_sessions(model, session, trie, *histories(model.config, lengths))
    assert leaves[:, 0].min() >= 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_catalogue_changes_between_calls_and_every_session_is_legal_and_distinct(
    served: Callable, shape: str
) -> None:
    model, session = served(shape)
    config = model.config
    for items in (1, 2, 3, WIDTH - 1, 5000, 40):
        trie = catalogue(config, items, seed=items)
        leaves = assert_same_sessions(model, session, trie, *histories(config, [4, 0], seed=items))
        live = leaves[(leaves >= 0).all(axis=-1)]
        assert len(live) > 0 or items < config.session_items
        rows = trie.session_rows(live)
        assert all(len(set(row)) == config.session_items for row in rows.tolist())
        if items < config.session_items:
            assert (leaves == -1).all()


@pytest.mark.slow
def test_every_item_at_one_triple_is_served_from_the_whole_list(served: Callable) -> None:
    model, session = served("item")
    trie = build_trie(np.full((4, 3), 7), CODES)
    leaves = assert_same_sessions(model, session, trie, *histories(model.config, [2, 5]))
    assert leaves[:, 0].tolist() == [[0, 0, 0]] * 2


@pytest.mark.slow
def test_a_publish_writes_weights_and_shares_the_graph(template_of: Callable, tmp_path: Path) -> None:
    template = template_of("item")
    trie, history = catalogue(SHAPES["item"], 200), histories(SHAPES["item"], [5])
    answers = []
    for seed in (1, 2):
        model, folder = make_model(SHAPES["item"], seed), tmp_path / str(seed)
        write_weights(model.state_dict(), template, folder)
        answers.append(assert_same_sessions(model, load(folder), trie, *history))
        assert (folder / GRAPH_FILE).samefile(template / "template.onnx")
    assert (answers[0] != answers[1]).any()


@pytest.mark.slow
def test_half_precision_weights_are_served_as_fp32(template_of: Callable, tmp_path: Path) -> None:
    model = make_model(SHAPES["item"]).bfloat16()
    write_weights(model.state_dict(), template_of("item"), tmp_path)
    assert_same_sessions(
        model.float(), load(tmp_path), catalogue(SHAPES["item"], 200), *histories(SHAPES["item"], [5])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("bos"), "bos is missing"),
        (lambda state: state.update(reward=torch.zeros(1)), "reward is unknown"),
        (lambda state: state.update(bos=torch.zeros(15)), r"bos is \[15\], not \[16\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    template_of: Callable, tmp_path: Path, spoil: Callable, message: str
) -> None:
    state = dict(make_model(SHAPES["item"]).state_dict())
    spoil(state)
    with pytest.raises(UserError, match=message):
        write_weights(state, template_of("item"), tmp_path / "version")
    assert not (tmp_path / "version").exists()


@pytest.mark.slow
def test_a_template_is_made_once_and_says_what_it_is_for(
    template_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = load_template(template_of("item"))
    assert isinstance(template, Template)
    assert template.settings == {"search": msgspec.to_builtins(SHAPES["item"]), "width": WIDTH}
    assert {place.name for place in template.weights} == set(OneRec(SHAPES["item"]).state_dict())
    monkeypatch.setattr("exporter.weights.export_template", lambda *_: pytest.fail("traced again"))
    template_of("item")


def test_the_key_of_a_template_follows_architecture_and_width() -> None:
    config = SHAPES["item"]
    keys = {template_key(search_plan(config, WIDTH)), template_key(search_plan(config, WIDTH + 1))}
    keys |= {
        template_key(search_plan(msgspec.structs.replace(config, levels=levels), WIDTH)) for levels in (2, 3, 4)
    }
    assert len(keys) == 4


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="template.json"):
        write_weights({}, tmp_path, tmp_path / "version")
