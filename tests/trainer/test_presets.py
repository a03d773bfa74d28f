"""Presets: the counts are those of the real module, and the table says what it claims."""

import pytest
import torch

from onerec.errors import UserError
from trainer.model import OneRec
from trainer.presets import PRESETS, active_parameters, preset, total_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_total_parameters_are_those_of_the_module(name):
    with torch.device("meta"):
        model = OneRec(PRESETS[name])
    assert total_parameters(PRESETS[name]) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_active_parameters_leave_out_input_tables_and_the_experts_not_chosen(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = OneRec(config)
    idle = sum(table.numel() for table in model.level_embedding) + model.bos.numel() + model.no_history.numel()
    for layer in model.decoder:
        idle += (config.experts - config.top_k) * (layer.moe.w1[0].numel() + layer.moe.w2[0].numel())
    assert active_parameters(config) == total_parameters(config) - idle


@pytest.mark.parametrize(("name", "total"), [("0.1B", 0.1e9), ("1B", 1e9)])
def test_presets_have_the_size_of_their_name_and_the_papers_experts(name, total):
    config = PRESETS[name]
    assert total_parameters(config) == pytest.approx(total, rel=0.1)
    assert (config.experts, config.top_k, config.codes, config.levels) == (24, 2, 8192, 3)
    assert (config.session_items, config.history_length) == (5, 256)


def test_1b_activates_13_percent():
    share = active_parameters(PRESETS["1B"]) / total_parameters(PRESETS["1B"])
    assert share == pytest.approx(0.13, abs=0.005)


def test_preset_takes_the_catalogues_codes_and_keeps_the_rest():
    config = preset("tiny", levels=4, codes=17, session_items=7, history_length=32, history_tokens="code")
    assert (config.levels, config.codes, config.session_items, config.history_length) == (4, 17, 7, 32)
    assert config.history_tokens == "code"
    assert (config.d_model, config.experts) == (PRESETS["tiny"].d_model, PRESETS["tiny"].experts)
    assert preset("small") == PRESETS["small"]


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(UserError, match="tiny, small, 0.1B, 1B"):
        preset("huge")


def test_impossible_value_is_named():
    with pytest.raises(UserError, match="codes"):
        preset("tiny", codes=0)
