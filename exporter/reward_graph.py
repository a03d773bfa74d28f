"""The reward model as an ONNX graph of its own: sessions and a history in, four rewards a session out (paper eq. 5-7).

It stands beside the search and is not joined to it: a request that goes by likelihood scores only what it returns.
"""

from __future__ import annotations

import sys
from functools import partial

import msgspec
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import exporter.tracing
import trainer.reward
from exporter.tracing import DYNAMIC, GraphPlan, WeightPlace, graph_model, graph_nodes, place_weights, references, trace
from trainer.config import RewardModelConfig
from trainer.reward import TARGETS, RewardModel

INPUTS = ("history", "history_mask", "sessions", "session_mask")
OUTPUT = "rewards"
_USERS, _HISTORY, _SESSIONS = 3, 5, 7


class _Rewards(nn.Module):
    """Traced as the whole graph."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor, history_mask: Tensor, sessions: Tensor, session_mask: Tensor) -> Tensor:
        return self.model.rewards(history, history_mask, sessions, session_mask)


def reward_plan(config: RewardModelConfig) -> GraphPlan:
    """The template of a reward model."""
    return GraphPlan(
        settings={"reward": msgspec.to_builtins(config)},
        code=(sys.modules[__name__], exporter.tracing, trainer.reward),
        inputs=list(INPUTS),
        outputs=[OUTPUT],
        places=partial(reward_layout, config),
        build=partial(build_reward_graph, config),
    )


def served_weights(model: RewardModel) -> dict[str, Tensor]:
    """What the graph reads of `RewardModel.state_dict()`: all but the towers of single items, which only help to train."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("item_towers.")}


def reward_layout(config: RewardModelConfig) -> list[WeightPlace]:
    """The weights file of a reward model: `served_weights` in their order."""
    with torch.device("meta"):
        model = RewardModel(config)
    return place_weights(served_weights(model))


def build_reward_graph(config: RewardModelConfig) -> onnx.ModelProto:
    """`RewardModel.rewards` of any number of users B, history items T and sessions W; its weights lie in a file.

    Inputs: history int64 [B, T, L], history_mask bool [B, T], sessions int64 [B, W, m, L], session_mask bool [B, W, m].
    Output: rewards fp32 [B, W, 4]. Initializers have the names of `served_weights`.
    """
    levels, items = config.levels, config.session_items
    with FakeTensorMode():
        model = RewardModel(config).eval()
    arguments = (
        torch.zeros(_USERS, _HISTORY, levels, dtype=torch.int64),
        torch.ones(_USERS, _HISTORY, dtype=torch.bool),
        torch.zeros(_USERS, _SESSIONS, items, levels, dtype=torch.int64),
        torch.ones(_USERS, _SESSIONS, items, dtype=torch.bool),
    )
    proto = trace(_Rewards(model), arguments, ({0: DYNAMIC, 1: DYNAMIC},) * len(INPUTS), [*INPUTS], [OUTPUT])
    nodes = graph_nodes(proto, "reward/", {name: name for name in (*INPUTS, OUTPUT)})
    inputs = [
        helper.make_tensor_value_info("history", TensorProto.INT64, ["batch", "items", levels]),
        helper.make_tensor_value_info("history_mask", TensorProto.BOOL, ["batch", "items"]),
        helper.make_tensor_value_info("sessions", TensorProto.INT64, ["batch", "width", items, levels]),
        helper.make_tensor_value_info("session_mask", TensorProto.BOOL, ["batch", "width", items]),
    ]
    output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", "width", len(TARGETS)])
    graph = helper.make_graph(nodes, "onerec_rewards", inputs, [output], references(reward_layout(config)))
    return graph_model(graph)
