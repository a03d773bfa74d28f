"""The rewards of reinforcement: what is legal, the reward model's part, and a user's function with all its faults."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.trie import build_trie
from onerec.errors import UserError
from trainer.config import RewardConfig, RewardModelConfig
from trainer.policy_rewards import IndustrialReward, PolicyRewards, legality, load_function
from trainer.reward import RewardModel, combine

TUPLES = np.array([[0, 1], [0, 1], [3, 2], [4, 4]], dtype=np.int32)
TRIE = build_trie(TUPLES, 5)


def reward_model(history_length=3):
    torch.manual_seed(0)
    return RewardModel(
        RewardModelConfig(
            dimension=8, heads=2, hidden=4, buckets=16, codes=5, levels=2, session_items=2, history_length=history_length
        )
    ).eval()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=3))
def test_legal_is_what_can_be_made_of_items_without_using_one_twice(session):
    left = [tuple(row) for row in TUPLES.tolist()]
    legal = True
    for item in session:
        if item in left:
            left.remove(item)
        else:
            legal = False
    found = legality(TRIE, np.array(session)[None, None])
    assert found.sessions.item() == legal
    assert found.items[0, 0].tolist() == [item in {tuple(row) for row in TUPLES.tolist()} for item in session]


def batch():
    generator = torch.Generator().manual_seed(1)
    history = torch.randint(0, 5, (2, 6, 2), generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    codes = torch.tensor([[[[0, 1], [3, 2]], [[0, 0], [3, 2]]], [[[4, 4], [4, 4]], [[0, 1], [0, 1]]]])
    return history, mask, codes


def test_only_legal_sessions_earn_the_reward_models_combined_reward():
    history, mask, codes = batch()
    model, config = reward_model(), RewardConfig(wtr=0.0)
    found = PolicyRewards(TRIE, model, config)(history, mask, codes)
    assert np.isfinite(found.rewards).tolist() == [[True, False], [False, True]]
    newest = torch.stack([history[0, 3:], torch.cat((history[1, :2], history[1, :1]))])
    short = torch.tensor([[True, True, True], [True, True, False]])
    with torch.no_grad():
        expected = combine(model.rewards(newest, short, codes, torch.ones(2, 2, 2, dtype=torch.bool)), config)
    for place in ((0, 0), (1, 1)):
        assert found.rewards[place] == pytest.approx(float(expected[place]), abs=1e-6)


def test_a_users_number_is_added_with_its_weight():
    history, mask, codes = batch()
    seen = []

    def function(items):
        seen.append(items)
        return 2

    industrial = IndustrialReward(function, ["a", "b", "c", "d"], name="two", warn=pytest.fail)
    plain = PolicyRewards(TRIE, reward_model(), RewardConfig())(history, mask, codes)
    found = PolicyRewards(TRIE, reward_model(), RewardConfig(), industrial=industrial, industrial_weight=0.25)(
        history, mask, codes
    )
    np.testing.assert_allclose(found.rewards, plain.rewards + 0.5)
    assert seen == [["a", "c"], ["a", "b"]] and industrial.faults == 0


@pytest.mark.parametrize("answer", [math.nan, math.inf, -math.inf, None, "much", ValueError("no author")])
def test_a_fault_of_the_function_is_a_counted_skip_with_one_warning_and_no_zero(answer):
    def function(items):
        if isinstance(answer, Exception):
            raise answer
        return answer

    warnings = []
    industrial = IndustrialReward(function, ["a", "b", "c", "d"], name="cap.py:cap", warn=warnings.append)
    found = PolicyRewards(TRIE, reward_model(), RewardConfig(), industrial=industrial)(*batch())
    assert np.isnan(found.rewards).all() and np.isfinite(found.preference).sum() == 2
    assert industrial.faults == 2 and len(warnings) == 1
    for word in ("cap.py:cap", "['a', 'c']", "mend"):
        assert word in warnings[0]


def test_a_function_is_found_in_a_file_and_in_a_module(tmp_path):
    path = tmp_path / "cap.py"
    path.write_text("def cap(items):\n    return -float(len(items) > len(set(items)))\n")
    assert load_function(f"{path}:cap")(["a", "a"]) == -1.0
    assert load_function("statistics:fmean")([1, 2]) == 1.5


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cap", "FILE.py:function"),
        (":cap", "FILE.py:function"),
        ("nowhere.py:cap", "there is no file"),
        ("no_such_module_here:cap", "cannot be imported"),
        ("math:nothing", "has no function nothing"),
        ("math:pi", "has no function pi"),
        ("{broken}:cap", "ZeroDivisionError"),
    ],
)
def test_what_is_no_function_is_refused(tmp_path, spec, words):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(UserError, match=words):
        load_function(spec.format(broken=broken))
