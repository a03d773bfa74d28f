"""The reward model chooses among the beams, scores what is returned, and a version without one says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_helpers import WIDTH, FakeCatalogue, expected_choice, expected_rewards, expected_session, make_bundle

from serving_config.recommend.engine import Engine
from serving_config.recommend.errors import RequestError
from serving_config.recommend.histories import Histories
from serving_config.recommend.rewards import best_by_reward
from serving_config.recommend.service import Answer, Request, Service
from trainer.config import RewardConfig
from trainer.reward_weights import combine_array

ITEMS = FakeCatalogue().item_ids
WEIGHTS = RewardConfig(swt=1.0, vtr=0.5, wtr=0.0, ltr=2.0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("bundle") / "1"
    make_bundle(folder, reward=WEIGHTS)
    return Service(Engine(folder), Histories(None))


def texts(*rows: list[str]) -> np.ndarray:
    return np.array([[text.encode() for text in row] for row in rows], dtype=object).reshape(len(rows), len(rows[0]))


def ask(history: list[str], count: int, select: str) -> Request:
    return Request(
        history=texts(history), count=np.array([[count]], dtype=np.int32), select=np.array([[select.encode()]], dtype=object)
    )


def one(service: Service, request: Request) -> Answer:
    [answer], _ = service.answer([request])
    assert isinstance(answer, Answer), answer
    return answer


def refusal(service: Service, request: Request) -> RequestError:
    [answer], _ = service.answer([request])
    assert isinstance(answer, RequestError), answer
    return answer


def sessions(answer: Answer) -> list[list[str]]:
    return [[item.decode() for item in session] for session in answer.items[0]]


@pytest.mark.parametrize("history", [[], ["v1"], ITEMS[:3], ITEMS])
def test_likelihood_keeps_its_order_and_tells_the_rewards(service: Service, history: list[str]) -> None:
    known = tuple(history[-6:])
    answer = one(service, ask(history, 4, "likelihood"))
    assert sessions(answer) == [expected_session(0, known, beam) for beam in range(4)]
    assert answer.rewards.shape == (1, 4, 4) and answer.rewards.dtype == np.float32
    assert answer.rewards[0] == pytest.approx(np.array([expected_rewards(s, known) for s in sessions(answer)]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(ITEMS), max_size=8), st.integers(1, WIDTH))
def test_reward_chooses_the_best_of_all_beams(service: Service, history: list[str], count: int) -> None:
    expected = expected_choice(0, tuple(history[-6:]), WEIGHTS)[:count]
    answer = one(service, ask(history, count, "reward"))
    assert sessions(answer) == [session for session, _, _ in expected]
    assert answer.rewards[0] == pytest.approx(np.array([rewards for _, rewards, _ in expected]))
    assert answer.scores[0].tolist() == [-beam - 1.0 for _, _, beam in expected], "scores stay with their sessions"
    assert (np.diff(combine_array(answer.rewards[0], WEIGHTS)) <= 0).all()


def test_a_batch_of_both_choices_answers_as_each_request_alone(service: Service) -> None:
    rng = np.random.default_rng(0)
    batch = [
        ask([ITEMS[row] for row in rng.integers(0, len(ITEMS), length)], count, select)
        for length, count, select in zip(
            rng.integers(0, 9, 50).tolist(), rng.integers(1, WIDTH + 1, 50).tolist(), ["reward", "likelihood"] * 25,
            strict=True,
        )
    ]  # fmt: skip
    together, counts = service.answer(batch)
    assert counts["refused"] == 0
    for request, answer in zip(batch, together, strict=True):
        alone = one(service, request)
        assert isinstance(answer, Answer)
        assert np.array_equal(answer.items, alone.items)
        assert np.array_equal(answer.rewards, alone.rewards)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=4, max_size=4), min_size=1, max_size=9),
    st.data(),
)
def test_of_equally_good_sessions_the_likelier_is_taken(rows: list[list[float]], data: st.DataObject) -> None:
    rewards = np.array(rows, np.float32)
    count = data.draw(st.integers(1, len(rows)))
    combined = combine_array(rewards, WEIGHTS).tolist()
    expected = sorted(range(len(rows)), key=lambda place: (-combined[place], place))[:count]
    assert best_by_reward(rewards, WEIGHTS, count).tolist() == expected


def test_the_weights_of_the_publish_decide(tmp_path: Path) -> None:
    answers = []
    for name in ("swt", "vtr", "wtr", "ltr"):
        only = RewardConfig(**{tower: float(tower == name) for tower in ("swt", "vtr", "wtr", "ltr")})
        make_bundle(tmp_path / name, reward=only)
        answers.append(sessions(one(Service(Engine(tmp_path / name), Histories(None)), ask(["v3"], WIDTH, "reward"))))
        assert answers[-1] == [session for session, _, _ in expected_choice(0, ("v3",), only)]
    assert len({str(answer) for answer in answers}) == 4


def test_only_live_beams_are_chosen_and_too_few_is_said(tmp_path: Path) -> None:
    make_bundle(tmp_path / "1", alive=2, reward=WEIGHTS)
    few = Service(Engine(tmp_path / "1"), Histories(None))
    expected = [entry for entry in expected_choice(0, ("v1",), WEIGHTS) if entry[2] < 2]
    assert sessions(one(few, ask(["v1"], 2, "reward"))) == [session for session, _, _ in expected]
    assert "only 2 different sessions" in str(refusal(few, ask(["v1"], 3, "reward")))


def test_a_version_without_a_reward_model_refuses_it_and_gives_no_rewards(tmp_path: Path) -> None:
    make_bundle(tmp_path / "1")
    plain = Service(Engine(tmp_path / "1"), Histories(None))
    error = refusal(plain, ask(["v1"], 1, "reward"))
    assert "without a reward model" in str(error) and error.client_fault
    assert np.isnan(one(plain, ask(["v1"], 2, "likelihood")).rewards).all()


@pytest.mark.parametrize(("choices", "fault"), [
    (["reward", "likelihood"], "select differs within one request"),
    (["likelihood", "best"], "one of 'likelihood', 'reward'"),
])  # fmt: skip
def test_rows_of_one_request_choose_alike(service: Service, choices: list[str], fault: str) -> None:
    request = Request(history=texts(["v1"], ["v2"]), select=texts(*[[choice] for choice in choices]))
    assert fault in str(refusal(service, request))
    both = Request(history=texts(["v1"], ["v2"]), select=texts(["reward"], ["reward"]))
    assert one(service, both).rewards.shape == (2, 1, 4)


def test_a_reward_that_is_no_number_is_never_an_order(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving_config.recommend.rewards import RewardGraph

    def broken(_: RewardGraph, histories: list, codes: np.ndarray) -> np.ndarray:
        return np.full((len(histories), codes.shape[1], 4), np.nan, np.float32)

    monkeypatch.setattr(RewardGraph, "rewards", broken)
    error = refusal(service, ask(["v1"], 1, "reward"))
    assert "not a number" in str(error) and not error.client_fault
    assert sessions(one(service, ask(["v1"], 1, "likelihood"))) == [expected_session(0, ("v1",))]
