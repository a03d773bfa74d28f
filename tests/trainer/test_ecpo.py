"""ECPO's objective and advantages against closed forms, and what a step of reinforcement does to a small policy."""

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.trie import build_trie
from onerec.errors import UserError
from trainer.config import ModelConfig, RewardConfig, RewardModelConfig
from trainer.data import Example
from trainer.ecpo import EcpoConfig, advantages, clipped_objective, reinforce
from trainer.model import OneRec
from trainer.policy_rewards import IndustrialReward, PolicyRewards
from trainer.reward import RewardModel

EPSILON, DELTA = 0.2, 0.1
CODES, M = 8, 2
LOG_RATIOS = st.floats(-6.0, 6.0)
ADVANTAGES = st.floats(-3.0, 3.0).filter(lambda value: abs(value) > 1e-3)


def objective(log_ratio, advantage, delta=DELTA):
    """Value of the objective and its gradient to log π_θ, in float64."""
    log_prob = torch.tensor(-20.0 + log_ratio, dtype=torch.float64, requires_grad=True)
    old = torch.tensor(-20.0, dtype=torch.float64)
    value = clipped_objective(log_prob, old, torch.tensor(advantage, dtype=torch.float64), epsilon=EPSILON, delta=delta)
    value.backward()
    return value.item(), log_prob.grad.item()


@pytest.mark.parametrize("delta", [DELTA, None])
@settings(deadline=None)
@given(advantage=ADVANTAGES)
def test_at_ratio_1_value_and_gradient_are_the_advantage(delta, advantage):
    assert objective(0.0, advantage, delta) == pytest.approx((advantage, advantage))


@settings(deadline=None)
@given(LOG_RATIOS, ADVANTAGES)
def test_grpos_clipping_in_closed_form(log_ratio, advantage):
    ratio = math.exp(log_ratio)
    value, slope = objective(log_ratio, advantage, delta=None)
    clipped = min(max(ratio, 1 - EPSILON), 1 + EPSILON)
    assert value == pytest.approx(min(ratio * advantage, clipped * advantage))
    still = (advantage > 0 and ratio > 1 + EPSILON) or (advantage < 0 and ratio < 1 - EPSILON)
    assert slope == pytest.approx(0.0 if still else ratio * advantage)


@settings(deadline=None)
@given(LOG_RATIOS, ADVANTAGES)
def test_early_clipping_in_closed_form(log_ratio, advantage):
    ratio = min(math.exp(log_ratio), 1 + EPSILON + DELTA)
    value, slope = objective(log_ratio, advantage)
    clipped = min(max(ratio, 1 - EPSILON), 1 + EPSILON)
    assert value == pytest.approx(min(ratio * advantage, clipped * advantage))
    still = (advantage > 0 and ratio > 1 + EPSILON) or (advantage < 0 and ratio < 1 - EPSILON)
    assert slope == pytest.approx(0.0 if still else ratio * advantage, abs=1e-9)


def test_early_clipping_bounds_the_gradient_that_grpo_lets_explode():
    for log_ratio in (2.0, 10.0, 40.0):
        assert objective(log_ratio, -1.0, delta=None)[1] == pytest.approx(-math.exp(log_ratio))
        assert objective(log_ratio, -1.0)[1] == pytest.approx(-(1 + EPSILON + DELTA))
    assert math.isfinite(objective(2000.0, -1.0)[0]) and not math.isfinite(objective(2000.0, -1.0, delta=None)[0])


def test_good_sessions_learn_as_under_grpo():
    for log_ratio in (-3.0, -0.1, 0.0, 0.15, 0.3, 3.0):
        assert objective(log_ratio, 1.5)[1] == pytest.approx(objective(log_ratio, 1.5, delta=None)[1])


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5), min_size=1, max_size=4))
def test_advantages_are_standard_within_their_group(groups):
    rewards = np.array(groups)
    found = advantages(rewards)
    for row, reward in enumerate(rewards):
        if reward.std() <= 1e-6:
            assert not found.values[row].any() and not found.weights[row].any()
        else:
            assert found.values[row].mean() == pytest.approx(0.0, abs=1e-7)
            assert found.values[row].std() == pytest.approx(1.0)
            assert found.weights[row].sum() == pytest.approx(1 / found.learnt)
            np.testing.assert_allclose(found.values[row], (reward - reward.mean()) / reward.std(), atol=1e-9)
    assert found.learnt + found.equal == len(rewards) and found.small == 0


def test_sessions_without_a_reward_are_no_members_and_skipped_groups_are_counted_by_kind():
    nan = math.nan
    found = advantages(np.array([[1.0, 3.0, nan], [2.0, 2.0, nan], [nan, nan, 5.0], [nan, nan, nan]]))
    assert (found.learnt, found.equal, found.small) == (1, 1, 2)
    assert found.values.tolist() == [[-1.0, 1.0, 0.0], [0.0] * 3, [0.0] * 3, [0.0] * 3]
    assert found.weights.tolist() == [[0.5, 0.5, 0.0], [0.0] * 3, [0.0] * 3, [0.0] * 3]


class Taste(RewardModel):
    """Likes sessions whose first item has a low first code; with `indifferent` it likes all the same."""

    def __init__(self, indifferent=False):
        super().__init__(RewardModelConfig(dimension=8, heads=2, hidden=4, buckets=8, codes=CODES, levels=2, session_items=M))
        self.indifferent = indifferent

    def rewards(self, history, history_mask, sessions, session_mask):
        liked = 1.0 - sessions[:, :, 0, 0].float() / CODES
        return (liked * 0 + 0.5 if self.indifferent else liked).unsqueeze(-1).expand(-1, -1, 4)


CATALOGUE = np.array([[a, b] for a in range(CODES) for b in range(0, CODES, 2)], dtype=np.int32)


def policy(seed=0):
    torch.manual_seed(seed)
    return OneRec(
        ModelConfig(
            d_model=16, heads=2, d_ff=24, experts=2, encoder_layers=1, decoder_layers=1, levels=2, codes=CODES, session_items=M
        )
    )


def examples(count=6, seed=0):
    rng = np.random.default_rng(seed)
    draw = [rng.permutation(len(CATALOGUE)).astype(np.int32) for _ in range(count)]
    return [Example(f"s{number}", number, rows[:number], rows[10 : 10 + M], True, True) for number, rows in enumerate(draw)]


def rewards_of(indifferent=False, function=None, warnings=None):
    industrial = None
    if function is not None:
        ids = [f"i{row}" for row in range(len(CATALOGUE))]
        industrial = IndustrialReward(function, ids, name="cap", warn=(warnings if warnings is not None else []).append)
    return PolicyRewards(build_trie(CATALOGUE, CODES), Taste(indifferent), RewardConfig(), industrial=industrial)


def run(steps, seed=1, rewards=None, model=None, **options):
    config = EcpoConfig(**{"users": 4, "group": 8, "format_sessions": 8, "learning_rate": 3e-3, **options})
    model = model or policy()
    generator = torch.Generator().manual_seed(seed)
    found = list(
        reinforce(model, examples(), CATALOGUE, rewards or rewards_of(), config, generator=generator, steps=steps)
    )
    return model, found


@pytest.mark.parametrize("source", ["trie", "free"])
def test_reinforcement_raises_what_the_reward_model_likes(source):
    _, steps = run(30, ntp_weight=0.0, source=source)
    first, last = (np.mean([step.reward for step in part]) for part in (steps[:5], steps[-5:]))
    assert last > first + 0.15


def test_the_format_reward_raises_legality_where_nothing_else_does():
    with_it = run(25, ntp_weight=0.0, rewards=rewards_of(indifferent=True))[1]
    without = run(25, ntp_weight=0.0, rewards=rewards_of(indifferent=True), format_weight=0.0)[1]
    assert all(step.equal_groups == 4 for step in with_it + without)
    first, last = (np.mean([step.legal for step in part]) for part in (with_it[:5], with_it[-5:]))
    assert last > first + 0.2
    assert np.mean([step.legal for step in without[-5:]]) < last - 0.2


def test_equal_rewards_leave_the_weights_alone_and_are_counted():
    before = {name: value.clone() for name, value in policy().state_dict().items()}
    model, steps = run(2, ntp_weight=0.0, format_weight=0.0, rewards=rewards_of(indifferent=True))
    assert [(step.groups, step.equal_groups) for step in steps] == [(0, 4), (0, 4)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_same_seed_same_weights_and_another_seed_others():
    one, same, other = (run(2, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_first_update_of_a_step_has_ratio_1_and_the_policy_gradient():
    """One update with A: the gradient norm is that of Σ w_i A_i ∇ log π(o_i), computed apart."""
    model = policy()
    _, (step,) = run(1, model=model, updates=1, ntp_weight=0.0, format_weight=0.0, learning_rate=1e-9, source="free")
    assert step.ratio == pytest.approx(1.0, abs=1e-4) and step.clipped == 0.0
    assert step.gradient == pytest.approx(_policy_gradient_norm(), rel=1e-3)


def test_an_old_policy_draws_until_it_is_renewed():
    _, fresh = run(4, updates=1, learning_rate=1e-2, ntp_weight=0.0)
    _, stale = run(4, updates=1, learning_rate=1e-2, ntp_weight=0.0, renew=3)
    assert all(step.ratio == pytest.approx(1.0, abs=1e-3) for step in fresh)
    assert [step.ratio > 1.05 for step in stale] == [False, True, True, False]


def _policy_gradient_norm():
    from trainer.data import to_arrays
    from trainer.rollout import sample_sessions

    model, generator = policy(), torch.Generator().manual_seed(1)
    drawn = torch.randint(6, (4,), generator=generator).tolist()
    history, mask = (torch.from_numpy(a) for a in to_arrays([examples()[i] for i in drawn], CATALOGUE, m=M)[:2])
    samples = sample_sessions(model, history, mask, count=8, generator=generator)
    found = advantages(rewards_of()(history, mask, samples.codes).rewards)
    log_probs = torch.stack(
        [model.session_log_prob(history, mask, samples.codes[:, g], torch.ones(4, M, dtype=torch.bool)) for g in range(8)], 1
    )
    total = (log_probs * torch.from_numpy(found.values * found.weights).float()).sum()
    gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients if gradient is not None))


def test_a_users_reward_moves_the_policy_and_its_faults_are_skips():
    def even(items):
        number = int(items[0][1:])
        if number % 4 == 3:
            raise KeyError(number)
        return math.nan if number % 4 == 2 else float(number % 4 == 0)

    warnings = []
    _, steps = run(30, ntp_weight=0.0, rewards=rewards_of(True, even, warnings))
    assert sum(step.faults for step in steps) > 10 and len(warnings) == 1 and "left out" in warnings[0]
    first, last = (np.mean([step.industrial for step in part]) for part in (steps[:5], steps[-5:]))
    assert last > first + 0.15


def test_what_cannot_be_reinforced_is_refused():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(UserError, match="no session"):
        next(reinforce(policy(), [], CATALOGUE, rewards_of(), EcpoConfig(), generator=generator, steps=1))
    with pytest.raises(UserError, match="catalogue has 1 items"):
        next(reinforce(policy(), examples(), CATALOGUE[:1], rewards_of(), EcpoConfig(), generator=generator, steps=1))


@pytest.mark.parametrize("options", [{"epsilon": 1.0}, {"delta": 0.0}, {"group": 1}, {"source": "beam"}, {"kl": 0.1}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(options, EcpoConfig)
