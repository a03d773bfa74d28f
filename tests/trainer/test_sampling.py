"""Pairs: winner and loser by the reward model among M_t's own sessions, with M_t's log-probabilities; noise is dropped."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from trainer.config import PreferenceConfig, RewardConfig, RewardModelConfig
from trainer.model import OneRec
from trainer.pairs import Drop, Pair
from trainer.presets import preset
from trainer.reward import RewardModel, combine
from trainer.sampling import REASONS, PairMaker, Request, Responses

CODES, ITEMS, M = 12, 60, 3
REWARD_SETTINGS = RewardModelConfig(dimension=8, heads=2, hidden=8, buckets=64, history_length=4, levels=2, codes=CODES,
                                    session_items=M)


def maker(items: int = ITEMS, reward: RewardConfig | None = None, **settings: Any) -> PairMaker:
    torch.manual_seed(5)  # of these weights no request has its best and its worst session of the same items
    config = msgspec.structs.replace(
        preset("tiny", levels=2, codes=CODES, session_items=M, history_length=6),
        d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, experts=2,
    )
    model, reward_model = OneRec(config), RewardModel(REWARD_SETTINGS)
    with torch.no_grad():
        # Far from the untrained heads, whose sessions are all about equally likely and worth the same.
        for parameter in (*model.level_head, *reward_model.parameters()):
            parameter.add_(0.5 * torch.randn_like(parameter))
    codes = np.array([divmod(i, CODES) for i in range(items)], np.int32)
    return PairMaker(
        model, reward_model, codes, PreferenceConfig(**{"responses": 8, "min_margin": 0.0} | settings),
        reward or RewardConfig(), snapshot_step=7, snapshot_version=3, codebook_version="book",
    )


def requests(count: int = 5) -> list[Request]:
    rng = np.random.default_rng(5)
    return [Request(f"u{i}:1", 10 + i, rng.integers(0, ITEMS, i * 2).astype(np.int32)) for i in range(count)]


def test_log_probabilities_are_those_of_the_snapshot_and_rewards_those_of_the_reward_model() -> None:
    made = maker(rejected=2)
    for request, record in zip(requests(), made.make(requests()), strict=True):
        assert isinstance(record, Pair)
        assert (record.session_id, record.sequence) == (request.session_id, request.sequence)
        assert (record.snapshot_step, record.snapshot_version, record.codebook_version) == (7, 3, "book")
        assert record.history == [[int(row) // CODES, int(row) % CODES] for row in request.history[-6:]]
        history = torch.tensor(record.history, dtype=torch.int64).view(1, -1, 2)
        sessions = torch.tensor([record.chosen, *record.rejected])
        with torch.no_grad():
            found = made._model.session_log_prob(
                history.expand(3, -1, -1), torch.ones(3, history.shape[1], dtype=torch.bool), sessions,
                torch.ones(3, M, dtype=torch.bool),
            )
            seen = history[:, -4:]
            towers = made._reward_model.rewards(
                seen, torch.ones(1, seen.shape[1], dtype=torch.bool), sessions[None], torch.ones(1, 3, M, dtype=torch.bool)
            )
        assert np.allclose([record.chosen_log_prob, *record.rejected_log_probs], found, atol=1e-4)
        assert np.allclose([record.chosen_reward, *record.rejected_rewards], towers[0], atol=1e-5)
        margin = combine(towers, RewardConfig())[0]
        assert record.margin == pytest.approx(float(margin[0] - margin[1:].max()), abs=1e-5)


def test_the_winner_has_the_highest_and_the_loser_the_lowest_reward_of_all_responses() -> None:
    made = maker(reward=RewardConfig(swt=2.0, vtr=0.0, wtr=1.0, ltr=0.0))
    for answer, record in zip(made.respond(requests()), made.make(requests()), strict=True):
        assert isinstance(record, Pair) and len(answer.rewards) == 8
        by_hand = (2 * answer.towers[:, 0] + answer.towers[:, 2]) / 3
        assert np.allclose(answer.rewards, by_hand, atol=1e-6)
        assert record.chosen == answer.codes[by_hand.argmax()].tolist()
        assert record.rejected == [answer.codes[by_hand.argmin()].tolist()]
        assert record.margin == pytest.approx(float(by_hand.max() - by_hand.min()), abs=1e-6)
        assert (np.diff(answer.log_probs) <= 0).all()


def test_a_pair_does_not_depend_on_its_batch() -> None:
    made = maker()
    together = made.make(requests())
    alone = [made.make([request])[0] for request in requests()]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, Pair) and isinstance(other, Pair)
        assert (one.chosen, one.rejected, one.session_id) == (other.chosen, other.rejected, other.session_id)
        assert one.chosen_log_prob == pytest.approx(other.chosen_log_prob, abs=1e-4)
    assert made.make([]) == []


def response(rewards: list[float], sessions: list[list[int]] | None = None) -> Responses:
    """Responses with these rewards; `sessions`: the items of each, as single codes."""
    count = len(rewards)
    codes = np.array(sessions or [[i, i + 1, i + 2] for i in range(count)], np.int64).reshape(count, M, 1)
    found = np.array(rewards, np.float32)
    return Responses(np.concatenate((codes, codes), axis=2), -np.arange(count, dtype=np.float32),
                     np.repeat(found[:, None], 4, axis=1), found)


REQUEST = Request("u:1", 1, np.array([0], np.int32))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (response([]), "few_responses"),
        (response([0.5]), "few_responses"),
        (response([0.5, 0.5, 0.5]), "tie"),
        (response([0.5, float("nan"), 0.1]), "not_finite"),
        (response([0.5, float("inf"), 0.1]), "not_finite"),
        (response([0.5, 0.4, 0.1], [[0, 1, 2], [3, 4, 5], [2, 0, 1]]), "same_items"),
        (response([0.5, 0.499, 0.495]), "margin"),
    ],
)
def test_what_is_no_preference_is_dropped_with_its_reason(answer: Responses, reason: str) -> None:
    found = maker(min_margin=0.01).choose(REQUEST, answer)
    assert isinstance(found, Drop) and found.reason == reason and reason in REASONS


def test_losers_are_of_other_items_than_the_winner_and_each_other() -> None:
    sessions = [[0, 1, 2], [3, 4, 5], [5, 4, 3], [2, 1, 0], [6, 7, 8]]
    answer = response([0.9, 0.1, 0.2, 0.3, 0.4], sessions)
    found = maker(rejected=2, min_margin=0.01).choose(REQUEST, answer)
    assert isinstance(found, Pair)
    assert [[item[0] for item in loser] for loser in found.rejected] == [[3, 4, 5], [6, 7, 8]]
    assert found.margin == pytest.approx(0.5)
    short = maker(rejected=3, min_margin=0.01).choose(REQUEST, answer)
    assert isinstance(short, Drop) and short.reason == "few_responses"


def test_a_catalogue_of_as_many_items_as_a_session_gives_no_pair() -> None:
    record = maker(items=M).make(requests(1))[0]
    assert isinstance(record, Drop) and record.reason == "same_items"
    record = maker(items=M - 1).make(requests(1))[0]
    assert isinstance(record, Drop) and record.reason == "few_responses"
