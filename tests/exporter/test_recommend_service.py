"""What the model answers, without Triton: one request's fault is its own, and batches change nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_helpers import MODEL, WIDTH, FakeCatalogue, expected_session, make_bundle

from serving_config.recommend.engine import Engine
from serving_config.recommend.errors import RequestError
from serving_config.recommend.histories import Histories
from serving_config.recommend.service import Answer, Request, Service

ITEMS = FakeCatalogue().item_ids
STORED = {"u1": ["v1", "v2"], "empty": []}


class Stored:
    """Histories held in memory; counts how often it was asked to catch up."""

    caught_up = 0

    def catch_up(self) -> None:
        self.caught_up += 1

    def of(self, user_id: str) -> list[str] | None:
        return STORED.get(user_id)

    def watermark(self) -> int | None:
        return 5_000 * self.caught_up

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("bundle") / "1"
    make_bundle(folder, 7)
    return Service(Engine(folder), Stored())


def texts(*rows: list[str]) -> np.ndarray:
    return np.array([[text.encode() for text in row] for row in rows], dtype=object).reshape(len(rows), len(rows[0]))


def numbers(*values: int) -> np.ndarray:
    return np.array([[value] for value in values], dtype=np.int32)


def one(service: Service, request: Request) -> Answer:
    [answer], _ = service.answer([request])
    assert isinstance(answer, Answer), answer
    return answer


def refusal(service: Service, request: Request) -> str:
    [answer], counts = service.answer([request])
    assert isinstance(answer, RequestError), answer
    assert counts["refused"] == 1
    return str(answer)


def decoded(answer: Answer) -> list[list[list[str]]]:
    return [[[item.decode() for item in session] for session in row] for row in answer.items]


def test_an_answer_has_the_shapes_and_types_of_the_contract(service: Service) -> None:
    answer = one(service, Request(history=texts(["v1", "v5"]), count=numbers(4)))
    assert answer.items.shape == (1, 4, MODEL.session_items)
    assert answer.scores.shape == (1, 4) and answer.scores.dtype == np.float32
    assert answer.rewards.shape == (1, 4, 4) and answer.rewards.dtype == np.float32
    assert np.isnan(answer.rewards).all()
    assert answer.model_version.tolist() == [[7]] and answer.model_version.dtype == np.int64
    assert answer.watermark.tolist() == [[1_000]] and answer.watermark.dtype == np.int64
    assert decoded(answer)[0] == [expected_session(0, ("v1", "v5"), beam) for beam in range(4)]
    assert (np.diff(answer.scores[0]) <= 0).all()


def test_one_session_is_the_default(service: Service) -> None:
    assert one(service, Request(history=texts(["v1"]))).items.shape == (1, 1, MODEL.session_items)


def test_a_given_history_wins_over_the_stored_one(service: Service) -> None:
    stored = one(service, Request(user_id=texts(["u1"])))
    assert decoded(stored)[0][0] == expected_session(0, ("v1", "v2"))
    given = one(service, Request(user_id=texts(["u1"]), history=texts(["v9"])))
    assert decoded(given)[0][0] == expected_session(0, ("v9",))


@pytest.mark.parametrize("request_", [
    Request(user_id=texts(["stranger"])),
    Request(user_id=texts(["empty"])),
    Request(history=np.empty((1, 0), dtype=object)),
    Request(user_id=texts(["u1"]), history=np.empty((1, 0), dtype=object)),
])  # fmt: skip
def test_nobody_known_gets_the_sessions_of_the_empty_history(service: Service, request_: Request) -> None:
    assert decoded(one(service, request_))[0][0] == expected_session(0)


def test_unknown_items_are_skipped_and_counted(service: Service) -> None:
    [answer], counts = service.answer([Request(history=texts(["?", "v1", "gone", "v2", "ü"]))])
    assert isinstance(answer, Answer)
    assert decoded(answer)[0][0] == expected_session(0, ("v1", "v2"))
    assert counts == {"unknown_items": 3, "unknown_users": 0, "refused": 0}
    _, counts = service.answer([Request(user_id=texts(["stranger"]))])
    assert counts["unknown_users"] == 1


def test_only_the_newest_known_items_are_read(service: Service) -> None:
    long = ITEMS[: MODEL.history_length + 4]
    answer = one(service, Request(history=texts([*long, "unknown"])))
    assert decoded(answer)[0][0] == expected_session(0, tuple(long[-MODEL.history_length :]))


@pytest.mark.parametrize(("request_", "fault"), [
    (Request(), "neither `user_id` nor `history`"),
    (Request(user_id=texts([""])), r"user_id\[0\] is empty"),
    (Request(history=texts(["v1", ""])), r"history\[1\] is empty"),
    (Request(user_id=texts([""]), history=texts(["v1"])), "user_id"),
    (Request(history=np.array([[b"\xff"]], dtype=object)), "not UTF-8"),
    (Request(history=texts(["v1"]), count=numbers(0)), "count = 0: from 1 to 5"),
    (Request(history=texts(["v1"]), count=numbers(-3)), "count = -3"),
    (Request(history=texts(["v1"]), count=numbers(WIDTH + 1)), "count = 6: from 1 to 5"),
    (Request(history=texts(["v1"]), select=texts(["reward"])), "without a reward model"),
    (Request(history=texts(["v1"]), select=texts(["best"])), "one of 'likelihood', 'reward'"),
    (Request(history=texts(["v1"], ["v2"]), count=numbers(1, 2)), "count differs"),
])  # fmt: skip
def test_a_wrong_request_is_told_what_is_wrong(service: Service, request_: Request, fault: str) -> None:
    import re

    assert re.search(fault, refusal(service, request_))


def test_a_wrong_request_does_not_touch_the_others_of_its_batch(service: Service) -> None:
    good = Request(history=texts(["v4"]), count=numbers(2))
    answers, counts = service.answer([good, Request(), good, Request(history=texts(["x"]), count=numbers(99)), good])
    assert [isinstance(answer, Answer) for answer in answers] == [True, False, True, False, True]
    assert counts["refused"] == 2
    for answer in answers[::2]:
        assert isinstance(answer, Answer)
        assert decoded(answer)[0] == [expected_session(0, ("v4",), beam) for beam in range(2)]


requests = st.builds(
    lambda rows, length, count: Request(
        history=texts(*[row[:length] for row in rows]) if length else np.empty((len(rows), 0), dtype=object),
        count=numbers(*[count] * len(rows)),
    ),
    st.lists(st.lists(st.sampled_from(ITEMS), min_size=9, max_size=9), min_size=1, max_size=3),
    st.integers(0, 9),
    st.integers(1, WIDTH),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, min_size=1, max_size=20))
def test_a_batch_answers_as_each_request_alone(service: Service, batch: list[Request]) -> None:
    together, _ = service.answer(batch)
    for request, answer in zip(batch, together, strict=True):
        alone = one(service, request)
        assert isinstance(answer, Answer)
        assert np.array_equal(answer.items, alone.items)
        assert np.array_equal(answer.scores, alone.scores)
        assert len(answer.items) == len(request.history) == len(answer.model_version) == len(answer.watermark)


def test_fewer_sessions_than_wanted_is_said_not_padded(tmp_path: Path) -> None:
    make_bundle(tmp_path / "1", alive=2)
    few = Service(Engine(tmp_path / "1"), Stored())
    assert one(few, Request(history=texts(["v1"]), count=numbers(2))).items.shape[1] == 2
    assert "only 2 different sessions; ask for at most 2" in refusal(
        few, Request(history=texts(["v1"]), count=numbers(3))
    )
    make_bundle(tmp_path / "2", alive=0)
    none = Service(Engine(tmp_path / "2"), Stored())
    assert "too small for a session of 3" in refusal(none, Request(history=texts(["v1"])))


def test_without_a_state_only_given_histories_are_answered(tmp_path: Path) -> None:
    make_bundle(tmp_path / "1")
    service = Service(Engine(tmp_path / "1"), Histories(None))
    assert "has no state" in refusal(service, Request(user_id=texts(["u1"])))
    one(service, Request(history=texts(["v1"])))
    one(service, Request(user_id=texts(["u1"]), history=texts(["v1"])))


def test_a_version_that_has_learnt_nothing_says_so(tmp_path: Path) -> None:
    make_bundle(tmp_path / "1", watermark=None)
    answer = one(Service(Engine(tmp_path / "1"), Stored()), Request(history=texts(["v1"])))
    assert answer.watermark.tolist() == [[-1]]


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU")
def test_a_gpu_that_cannot_be_used_is_said_and_the_cpu_serves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_bundle(tmp_path / "1")
    answer = one(Service(Engine(tmp_path / "1", device=0), Stored()), Request(history=texts(["v1"])))
    assert decoded(answer)[0][0] == expected_session(0, ("v1",))
    assert "running on the CPU" in capfd.readouterr().err
