"""Each preference loss against its closed form in value and gradient, and the options that a loss refuses."""

import math

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec.errors import UserError
from trainer.config import ModelConfig, PreferenceConfig
from trainer.model import OneRec
from trainer.preference import LOSSES, REFERENCE_FREE, PreferenceBatch, check, loss, preference_loss, terms

CODES = 15
LOG_PROBS = st.floats(-80.0, -1.0)
BETAS = st.floats(0.05, 3.0)
SMOOTHINGS = st.floats(0.0, 0.45)


def config_of(name, **given_options):
    return PreferenceConfig(loss=name, **given_options)


def evaluate(config, chosen, rejected, chosen_reference=0.0, rejected_reference=None, codes=CODES):
    """Value, gradient to the winner's log-probability, then to each loser's, in float64."""
    losers = rejected if isinstance(rejected, list) else [rejected]
    references = rejected_reference if isinstance(rejected_reference, list) else [rejected_reference or 0.0] * len(losers)
    win, lose = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (chosen, losers))
    losses, _ = preference_loss(
        config,
        win,
        lose,
        torch.tensor([chosen_reference], dtype=torch.float64),
        torch.tensor([references], dtype=torch.float64),
        codes=codes,
    )
    losses.sum().backward()
    return (losses.item(), win.grad.item(), *lose.grad[0].tolist())


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


@pytest.mark.parametrize("name", ["dpo", "cdpo", "rdpo", "s-dpo"])
def test_log_2_where_policy_and_reference_agree(name):
    value, up, down = evaluate(config_of(name), -30.0, -50.0, -30.0, -50.0)
    assert value == pytest.approx(math.log(2))
    assert up < 0 < down and up == pytest.approx(-down)


@settings(deadline=None)
@given(LOG_PROBS, LOG_PROBS, LOG_PROBS, LOG_PROBS, BETAS)
def test_dpo_in_closed_form(win, lose, rw, rl, beta):
    h = (win - rw) - (lose - rl)
    value, up, down = evaluate(config_of("dpo", beta=beta), win, lose, rw, rl)
    assert value == pytest.approx(softplus(-beta * h))
    assert up == pytest.approx(-beta * sigmoid(-beta * h)) and down == pytest.approx(-up)


@settings(deadline=None)
@given(LOG_PROBS, LOG_PROBS, LOG_PROBS, LOG_PROBS, BETAS)
def test_ipo_in_closed_form(win, lose, rw, rl, beta):
    h = (win - rw) - (lose - rl)
    value, up, down = evaluate(config_of("ipo", beta=beta), win, lose, rw, rl)
    assert value == pytest.approx((h - 1 / (2 * beta)) ** 2, abs=1e-9)
    assert up == pytest.approx(2 * (h - 1 / (2 * beta)), abs=1e-9) and down == pytest.approx(-up)


def test_ipo_has_its_minimum_at_half_of_one_over_beta():
    for beta in (0.1, 0.5, 2.0):
        config = config_of("ipo", beta=beta)
        best = 1 / (2 * beta)
        value, up, _ = evaluate(config, best - 20.0, -20.0)
        assert value == pytest.approx(0.0, abs=1e-12) and up == pytest.approx(0.0, abs=1e-9)
        assert evaluate(config, best - 21.0, -20.0)[1] < 0 < evaluate(config, best - 19.0, -20.0)[1]


@settings(deadline=None)
@given(LOG_PROBS, LOG_PROBS, BETAS, SMOOTHINGS)
def test_cdpo_and_rdpo_in_closed_form(win, lose, beta, epsilon):
    h = win - lose
    right, wrong = softplus(-beta * h), softplus(beta * h)
    value, up, down = evaluate(config_of("cdpo", beta=beta, label_smoothing=epsilon), win, lose)
    assert value == pytest.approx((1 - epsilon) * right + epsilon * wrong)
    assert up == pytest.approx(-beta * (sigmoid(-beta * h) - epsilon), abs=1e-9) and down == pytest.approx(-up)
    value, up, down = evaluate(config_of("rdpo", beta=beta, label_smoothing=epsilon), win, lose)
    assert value == pytest.approx(((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon))
    slope = (1 - epsilon) * sigmoid(-beta * h) + epsilon * sigmoid(beta * h)
    assert up == pytest.approx(-beta * slope / (1 - 2 * epsilon)) and down == pytest.approx(-up)


@pytest.mark.parametrize("name", ["cdpo", "rdpo"])
def test_without_smoothing_they_are_dpo(name):
    for h in (-30.0, -1.0, 0.0, 2.0, 30.0):
        ours = evaluate(config_of(name, beta=0.3, label_smoothing=0.0), h - 20.0, -20.0)
        assert ours == pytest.approx(evaluate(config_of("dpo", beta=0.3), h - 20.0, -20.0))
    near = evaluate(config_of(name, beta=0.3, label_smoothing=1e-7), -18.0, -20.0)
    assert near == pytest.approx(evaluate(config_of("dpo", beta=0.3), -18.0, -20.0), rel=1e-5)


@settings(deadline=None)
@given(LOG_PROBS, LOG_PROBS, BETAS, st.floats(0.01, 0.45))
def test_rdpo_of_flipped_labels_is_dpo_in_the_mean(win, lose, beta, epsilon):
    robust = config_of("rdpo", beta=beta, label_smoothing=epsilon)
    mean = (1 - epsilon) * evaluate(robust, win, lose)[0] + epsilon * evaluate(robust, lose, win)[0]
    assert mean == pytest.approx(evaluate(config_of("dpo", beta=beta), win, lose)[0], abs=1e-6)


def test_cdpo_is_least_where_the_label_is_believed_as_often_as_it_is_right():
    config = config_of("cdpo", beta=0.5, label_smoothing=0.2)
    h = math.log(0.8 / 0.2) / 0.5
    assert evaluate(config, h - 20.0, -20.0)[1] == pytest.approx(0.0, abs=1e-9)


@settings(deadline=None)
@given(LOG_PROBS, LOG_PROBS, BETAS)
def test_cpo_in_closed_form_with_its_likelihood_term(win, lose, beta):
    value, up, down = evaluate(config_of("cpo", beta=beta), win, lose)
    assert value == pytest.approx(softplus(-beta * (win - lose)) - win / CODES)
    pull = beta * sigmoid(-beta * (win - lose))
    assert up == pytest.approx(-pull - 1 / CODES) and down == pytest.approx(pull)


@settings(deadline=None)
@given(LOG_PROBS, LOG_PROBS, BETAS, st.floats(0.0, 2.0), st.integers(1, 30))
def test_simpo_in_closed_form_per_code_and_with_its_margin(win, lose, beta, gamma, codes):
    value, up, down = evaluate(config_of("simpo", beta=beta, gamma=gamma), win, lose, codes=codes)
    x = beta * (win - lose) / codes - beta * gamma
    assert value == pytest.approx(softplus(-x))
    assert up == pytest.approx(-beta / codes * sigmoid(-x)) and down == pytest.approx(-up)


def test_simpo_is_log_2_where_the_mean_code_leads_by_the_margin():
    value, _, _ = evaluate(config_of("simpo", beta=2.0, gamma=0.5), 0.5 * CODES - 40.0, -40.0)
    assert value == pytest.approx(math.log(2))


@settings(deadline=None)
@given(LOG_PROBS, st.lists(LOG_PROBS, min_size=1, max_size=4), BETAS)
def test_s_dpo_in_closed_form(win, losers, beta):
    value, up, *down = evaluate(config_of("s-dpo", beta=beta, rejected=len(losers)), win, losers)
    each = [beta * (lose - win) for lose in losers]
    highest = max(each)
    total = highest + math.log(sum(math.exp(x - highest) for x in each))
    assert value == pytest.approx(softplus(total))
    pull = beta * sigmoid(total)
    assert up == pytest.approx(-pull)
    assert down == pytest.approx([pull * math.exp(x - total) for x in each], abs=1e-12)


@settings(deadline=None)
@given(LOG_PROBS, LOG_PROBS, LOG_PROBS, LOG_PROBS, BETAS)
def test_s_dpo_with_one_loser_is_dpo(win, lose, rw, rl, beta):
    ours = evaluate(config_of("s-dpo", beta=beta), win, lose, rw, rl)
    assert ours == pytest.approx(evaluate(config_of("dpo", beta=beta), win, lose, rw, rl))


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_reference_free_read_no_reference(name):
    near = evaluate(config_of(name), -20.0, -22.0, -20.0, -22.0)
    far = evaluate(config_of(name), -20.0, -22.0, -9.0, -40.0)
    assert (near == far) == (name in REFERENCE_FREE)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_raises_the_winner_and_lowers_the_loser(name):
    _, up, down = evaluate(config_of(name), -30.0, -30.0, -30.0, -30.0)
    assert up < 0 < down


@pytest.mark.parametrize("name", LOSSES)
def test_far_off_log_probabilities_stay_finite(name):
    for chosen, rejected in ((-2000.0, -1.0), (-1.0, -2000.0)):
        value, up, down = evaluate(config_of(name), chosen, rejected)
        assert all(map(math.isfinite, (value, up, down)))


def test_given_constants_win_over_the_loss_own():
    assert terms(config_of("simpo")) == LOSSES["simpo"][1]
    assert terms(config_of("simpo", gamma=0.0)).gamma == 0.0
    assert terms(config_of("cdpo", beta=0.7))[:2] == (0.7, LOSSES["cdpo"][1].label_smoothing)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, ["label_smoothing=0.1", "loss=ipo", "cdpo or rdpo"]),
        ({"loss": "dpo", "gamma": 0.5}, ["gamma=0.5", "loss=dpo", "simpo"]),
        ({"loss": "cpo", "gamma": 0.0}, ["gamma=0.0", "loss=cpo", "leave"]),
        ({"loss": "simpo", "label_smoothing": 0.0}, ["label_smoothing=0.0", "loss=simpo"]),
        ({"loss": "dpo", "rejected": 3}, ["rejected=3", "loss=dpo", "s-dpo"]),
        ({"loss": "s-dpo", "rejected": 4, "responses": 4}, ["rejected=4", "responses=4"]),
        ({"loss": "kto"}, ["loss=kto", "dpo, ipo"]),
    ],
)
def test_conflicting_options_are_refused_by_both_names(options, words):
    with pytest.raises(UserError) as caught:
        check(PreferenceConfig(**options))
    for word in words:
        assert word in str(caught.value)


def test_sound_options_pass():
    for name in LOSSES:
        check(PreferenceConfig(loss=name, beta=0.2))
    check(PreferenceConfig(loss="rdpo", label_smoothing=0.2))
    check(PreferenceConfig(loss="simpo", gamma=0.0))
    check(PreferenceConfig(loss="s-dpo", rejected=3))


def test_every_loss_of_the_configuration_exists():
    names = {"dpo", "ipo", "cdpo", "rdpo", "cpo", "simpo", "s-dpo"}
    assert set(LOSSES) == names
    for name in names:
        assert msgspec.convert({"loss": name}, PreferenceConfig).loss == name


def test_several_losers_are_refused_where_the_loss_compares_with_one():
    with pytest.raises(ValueError, match="one loser, not 2"):
        evaluate(config_of("dpo"), -20.0, [-21.0, -22.0])


def model_and_batch(losers, seed=0):
    torch.manual_seed(seed)
    model = OneRec(ModelConfig(d_model=32, heads=2, d_ff=48, codes=16, experts=3, history_length=8))
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(0, 16, (4, 6, 3), generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 0, 3, 5])[:, None]
    sessions = torch.randint(0, 16, (4, 1 + losers, 5, 3), generator=generator)
    with torch.no_grad():
        reference = torch.stack([log_prob(model, history, mask, sessions[:, win]) for win in range(1 + losers)], dim=1)
    reference = reference + 0.3 * torch.randn(reference.shape, generator=generator)
    return model, PreferenceBatch(history, mask, sessions[:, 0], sessions[:, 1:], reference[:, 0], reference[:, 1:])


def log_prob(model, history, mask, session):
    return model.session_log_prob(history, mask, session, torch.ones(session.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize("name", ["dpo", "cpo", "s-dpo"])
def test_shared_encoder_pass_equals_separate_ones_in_value_and_gradient(name):
    losers = 3 if name == "s-dpo" else 1
    model, batch = model_and_batch(losers)
    config = PreferenceConfig(loss=name, rejected=losers)
    together, stats = loss(model, batch, config)
    chosen = log_prob(model, batch.history, batch.history_mask, batch.chosen)
    rejected = [log_prob(model, batch.history, batch.history_mask, batch.rejected[:, r]) for r in range(losers)]
    losses, each = preference_loss(
        config, chosen, torch.stack(rejected, 1), batch.chosen_reference, batch.rejected_reference, codes=CODES
    )
    torch.testing.assert_close(together, losses.mean())
    for key, value in stats.items():
        torch.testing.assert_close(value, each[key].mean(), rtol=1e-4, atol=1e-5, msg=key)
        assert value.dim() == 0 and not value.requires_grad
    parameters = list(model.parameters())
    ours, theirs = torch.autograd.grad(together, parameters), torch.autograd.grad(losses.mean(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_encoder_runs_once_a_pair(monkeypatch):
    model, batch = model_and_batch(3)
    seen = []
    stack = model._encoder_stack  # noqa: SLF001
    monkeypatch.setattr(model, "_encoder_stack", lambda x, mask: (seen.append(x.shape[0] * x.shape[1]), stack(x, mask))[1])
    loss(model, batch, PreferenceConfig(loss="s-dpo", rejected=3))
    once = int(batch.history_mask.sum()) + len(batch.chosen)
    assert len(seen) == 1 and once <= seen[0] < 2 * once


def test_learning_pairs_widens_their_margin():
    model, batch = model_and_batch(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    margins = []
    for _ in range(8):
        value, stats = loss(model, batch, PreferenceConfig())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        margins.append(float(stats["margin"]))
    assert margins[-1] > margins[0] + 0.1


def test_stats_say_margin_and_accuracy_in_nats():
    _, stats = preference_loss(
        PreferenceConfig(),
        torch.tensor([-10.0, -10.0]),
        torch.tensor([[-12.0], [-12.0]]),
        torch.tensor([-11.0, -10.0]),
        torch.tensor([[-12.0], [-15.0]]),
        codes=CODES,
    )
    assert stats["chosen_logratios"].tolist() == [1.0, 0.0] and stats["rejected_logratios"].tolist() == [0.0, 3.0]
    assert stats["margin"].tolist() == [1.0, -3.0] and stats["accuracy"].tolist() == [1.0, 0.0]
