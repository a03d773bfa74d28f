"""What the model `recommend` answers (docs/serving.md, "The model `recommend`"): arrays in, arrays out, no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from serving_config.recommend.engine import Engine, History, Select, Sessions, Wanted
from serving_config.recommend.errors import RequestError
from trainer.reward_weights import TARGETS

NO_WATERMARK = -1
"""`watermark` of a version that has learnt nothing yet; `history_watermark` of a host without a state or an event."""


class HistorySource(Protocol):
    """Where stored histories come from."""

    def catch_up(self) -> None:
        """See the newest commits."""

    def of(self, user_id: str) -> list[str] | None:
        """Item ids oldest first; None for an unknown user."""

    def watermark(self) -> int | None:
        """Time in ms of the newest event that the histories hold; None where there is none."""

    def close(self) -> None:
        """Let go of the source."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """The tensors of one request as they came, None where left out; B rows each.

    `sessions` false: only what the version says of itself is asked for, so nothing is searched.
    """

    user_id: NDArray[np.object_] | None = None
    history: NDArray[np.object_] | None = None
    count: NDArray[np.int32] | None = None
    select: NDArray[np.object_] | None = None
    sessions: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """items [B, count, m] of bytes, scores [B, count], rewards [B, count, 4] (NaN: the version has no reward model),
    model_version, watermark and history_watermark int64 [B, 1] (in ms, NO_WATERMARK where there is nothing yet)."""

    items: NDArray[np.object_]
    scores: NDArray[np.float32]
    rewards: NDArray[np.float32]
    model_version: NDArray[np.int64]
    watermark: NDArray[np.int64]
    history_watermark: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A request understood: one history a row, all with the same count and choice."""

    histories: list[History]
    count: int
    select: Select
    unknown_users: int
    sessions: bool


class Service:
    """One version's engine and the histories of this host."""

    def __init__(self, engine: Engine, histories: HistorySource) -> None:
        self._engine = engine
        self._histories = histories
        items = engine.manifest.model_config.session_items
        self._nothing = Sessions(
            np.empty((0, items), dtype=np.object_), np.empty(0, np.float32), np.empty((0, len(TARGETS)), np.float32)
        )

    def answer(self, requests: Sequence[Request]) -> tuple[list[Answer | RequestError], dict[str, int]]:
        """All requests in one run of the graph; also counts of unknown items, unknown users and refused requests."""
        self._histories.catch_up()
        plans: list[_Plan | RequestError] = []
        for request in requests:
            try:
                plans.append(self._plan(request))
            except RequestError as error:
                plans.append(error)
        understood = [plan for plan in plans if isinstance(plan, _Plan)]
        rows = [
            Wanted(history=history.codes, count=plan.count, select=plan.select)
            for plan in understood
            if plan.sessions
            for history in plan.histories
        ]
        counts = {
            "unknown_items": sum(history.unknown for plan in understood for history in plan.histories),
            "unknown_users": sum(plan.unknown_users for plan in understood),
        }
        try:
            found = self._engine.answer(rows) if rows else []
        except Exception as error:  # ONNX Runtime's exceptions share no base class; e.g. out of memory
            failed = RequestError(f"the model could not be run: {error}", client_fault=False)
            answers: list[Answer | RequestError] = [failed if isinstance(plan, _Plan) else plan for plan in plans]
        else:
            answers = []
            for plan in plans:
                if isinstance(plan, RequestError):
                    answers.append(plan)
                    continue
                if not plan.sessions:
                    answers.append(self._answer([self._nothing] * len(plan.histories)))
                    continue
                own, found = found[: len(plan.histories)], found[len(plan.histories) :]
                faults = [row for row in own if isinstance(row, RequestError)]
                answers.append(faults[0] if faults else self._answer([row for row in own if isinstance(row, Sessions)]))
        counts["refused"] = sum(isinstance(answer, RequestError) for answer in answers)
        return answers, counts

    def close(self) -> None:
        """Let go of the state."""
        self._histories.close()

    def _plan(self, request: Request) -> _Plan:
        count = self._count(request.count)
        select = _select(request.select)
        unknown_users = 0
        if request.history is not None:
            if request.user_id is not None:
                _texts(request.user_id, "user_id")
            histories = [_texts(row, "history") for row in request.history]
        elif request.user_id is not None:
            histories = []
            for user_id in _texts(request.user_id, "user_id"):
                stored = self._histories.of(user_id)
                unknown_users += stored is None
                histories.append(stored or [])
        else:
            raise RequestError("neither `user_id` nor `history`: send at least one")
        known = [self._engine.history(history) for history in histories]
        return _Plan(
            histories=known, count=count, select=select, unknown_users=unknown_users, sessions=request.sessions
        )

    def _count(self, values: NDArray[np.int32] | None) -> int:
        if values is None:
            return 1
        found = sorted({int(value) for value in values.ravel()})
        width = self._engine.manifest.width
        if len(found) != 1:
            raise RequestError(f"count differs within one request ({found}); send one request for each")
        if not 1 <= found[0] <= width:
            raise RequestError(f"count = {found[0]}: from 1 to {width}, the beam width of this version")
        return found[0]

    def _answer(self, sessions: Sequence[Sessions]) -> Answer:
        manifest = self._engine.manifest
        rows = len(sessions)
        watermark = NO_WATERMARK if manifest.watermark is None else manifest.watermark
        newest = self._histories.watermark()
        return Answer(
            items=np.stack([session.items for session in sessions]),
            scores=np.stack([session.scores for session in sessions]),
            rewards=np.stack([session.rewards for session in sessions]),
            model_version=np.full((rows, 1), manifest.version, dtype=np.int64),
            watermark=np.full((rows, 1), watermark, dtype=np.int64),
            history_watermark=np.full((rows, 1), NO_WATERMARK if newest is None else newest, dtype=np.int64),
        )


def _texts(values: NDArray[np.object_], name: str) -> list[str]:
    """UTF-8 texts of a BYTES tensor; RequestError for an empty one or one that is not UTF-8."""
    texts = []
    for place, value in enumerate(values.ravel()):
        try:
            text = value.decode() if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError:
            raise RequestError(f"{name}[{place}] is not UTF-8: {value!r}") from None
        if not text:
            raise RequestError(f"{name}[{place}] is empty; an id has at least one character")
        texts.append(text)
    return texts


def _select(values: NDArray[np.object_] | None) -> Select:
    if values is None:
        return "likelihood"
    found = sorted(set(_texts(values, "select")))
    for choice in found:
        if choice not in get_args(Select):
            raise RequestError(f"select = {choice!r}: one of 'likelihood', 'reward'")
    if len(found) > 1:
        raise RequestError(f"select differs within one request ({found}); send one request for each")
    return "reward" if found == ["reward"] else "likelihood"
