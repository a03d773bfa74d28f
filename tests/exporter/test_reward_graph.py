"""The exported reward model gives torch's rewards, whatever comes in; its template follows its architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.bundle import link
from exporter.export import find_template
from exporter.onnx_graph import search_plan
from exporter.optimise import CPU_TEMPLATE
from exporter.parity import torch_rewards
from exporter.reward_graph import reward_plan, served_weights
from exporter.weights import template_key, write_weights
from onerec.errors import UserError
from serving_config.recommend.graphs import CPU_GRAPH_FILE
from serving_config.recommend.rewards import RewardGraph
from trainer.config import ModelConfig, RewardModelConfig
from trainer.reward import RewardModel

CODES = 16
SHAPES = {
    "three levels": RewardModelConfig(
        dimension=16, heads=2, layers=2, hidden=8, buckets=50, history_length=9, codes=CODES, session_items=3
    ),
    "one level, one item": RewardModelConfig(
        dimension=8, heads=2, hidden=8, buckets=5, history_length=4, codes=CODES, levels=1, session_items=1
    ),
}


def make_model(config: RewardModelConfig, seed: int = 0) -> RewardModel:
    """Every weight random, so that none may be left out unseen; those that begin at 0 too."""
    model = RewardModel(config)
    generator = torch.Generator().manual_seed(seed)
    model.reset_parameters(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def template_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the template of a shape once."""
    folder = tmp_path_factory.mktemp("templates")
    return lambda name: find_template(reward_plan(SHAPES[name]), folder)


@pytest.fixture(scope="module")
def served(
    template_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[RewardModel, RewardGraph]]:
    """A model and its loaded graph."""
    loaded: dict[str, tuple[RewardModel, RewardGraph]] = {}

    def get(name: str) -> tuple[RewardModel, RewardGraph]:
        if name not in loaded:
            model, folder = make_model(SHAPES[name]), tmp_path_factory.mktemp("version")
            write_weights(served_weights(model), template_of(name), folder)
            link(template_of(name) / CPU_TEMPLATE, folder / CPU_GRAPH_FILE)
            loaded[name] = model, RewardGraph(folder, SHAPES[name], threads=1)
        return loaded[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 14), min_size=1, max_size=4), width=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_torch_and_onnx_runtime_give_the_same_rewards(
    served: Callable, shape: str, lengths: list[int], width: int, seed: int
) -> None:
    model, graph = served(shape)
    config, rng = SHAPES[shape], np.random.default_rng(seed)
    histories = [rng.integers(0, CODES, (length, config.levels)) for length in lengths]
    sessions = rng.integers(0, CODES, (len(lengths), width, config.session_items, config.levels))
    rewards = graph.rewards(histories, sessions)
    assert rewards.shape == (len(lengths), width, 4) and rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, torch_rewards(model, histories, sessions), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_rewards_depend_on_the_history_its_newest_items_and_the_order(served: Callable) -> None:
    _, graph = served("three levels")
    config, rng = SHAPES["three levels"], np.random.default_rng(0)
    history = rng.integers(0, CODES, (20, config.levels))
    sessions = rng.integers(0, CODES, (1, 6, config.session_items, config.levels))
    told = graph.rewards([history], sessions)
    assert np.array_equal(told, graph.rewards([history[-config.history_length :]], sessions))
    assert np.abs(told - graph.rewards([history[:0]], sessions)).max() > 1e-3
    assert np.abs(told - graph.rewards([history[::-1].copy()], sessions)).max() > 1e-3
    assert np.abs(told - graph.rewards([history], sessions[:, :, ::-1].copy())).max() > 1e-3


@pytest.mark.slow
def test_weights_of_another_reward_model_are_refused(template_of: Callable, tmp_path: Path) -> None:
    other = RewardModel(msgspec.structs.replace(SHAPES["three levels"], dimension=8))
    with pytest.raises(UserError, match="do not fit the graph template"):
        write_weights(served_weights(other), template_of("three levels"), tmp_path / "version")
    assert not (tmp_path / "version").exists()


def test_the_key_of_a_template_follows_the_reward_models_architecture() -> None:
    config = SHAPES["three levels"]
    changes = [{}, {"buckets": 51}, {"history_length": 8}, {"layers": 1}, {"levels": 2}]
    keys = {template_key(reward_plan(msgspec.structs.replace(config, **change))) for change in changes}
    assert len(keys) == len(changes)
    assert template_key(search_plan(ModelConfig(), 8)) not in keys
