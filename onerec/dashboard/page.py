"""All parts of the page together: what is asked, and the answers as JSON values."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from onerec.dashboard.chain import chain
from onerec.dashboard.drift import DriftView
from onerec.dashboard.parts import Answer, Part, reason
from onerec.dashboard.releases import ReleasesView
from onerec.dashboard.replicas import Replica
from onerec.dashboard.runs import RunView
from onerec.dashboard.scrape import LagView
from onerec.dashboard.state import StateView
from onerec.monitor.log_time import Clock, LogClock
from onerec.monitor.settings import ClockMode, MonitorConfig

USER_SECONDS = 5.0
"""How long the page waits for what is known of one user."""


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """Where the page looks: folders, Triton replicas as host:port, and a URL of metrics or None."""

    state: Path
    run: Path
    repository: Path
    servers: tuple[str, ...]
    metrics: str | None = None


class Page:
    """Parts by name, each asked apart from the others."""

    def __init__(
        self,
        sources: Sources,
        *,
        mode: ClockMode = "auto",
        objective_s: float = 30.0,
        watch: MonitorConfig | None = None,
        titles: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        generator: random.Random | None = None,
    ) -> None:
        watch = watch or MonitorConfig()
        self._sources, self._objective_s, self._psi = sources, objective_s, (watch.psi_look, watch.psi_act)
        self._clock = clock or Clock()
        self._log = LogClock(mode, self._clock)
        self._generator = generator or random.Random()  # noqa: S311 - picks a user to look at
        self._state = StateView(sources.state, titles or {})
        run = RunView(sources.run)
        releases = ReleasesView(sources.repository)
        drift = DriftView(sources.run, self._state, sources.repository, watch)
        self._replicas = [Replica(server, sources.repository) for server in sources.servers]
        questions: dict[str, tuple[Callable[[], Any], float]] = {
            "stream": (self._state.progress, 1.0),
            "checkpoint": (run.checkpoint, 1.0),
            "training": (run.curves, 2.0),
            "ledger": (run.ledger, 1.0),
            "drift": (drift.look, 5.0),
            "releases": (lambda: releases.look(self._answered()), 1.0),
            "lag": (LagView(sources.run, sources.metrics).look, 1.0),
            **{f"replica {replica.address}": (replica.look, 1.0) for replica in self._replicas},
        }
        self._parts = {
            name: Part(question, fresh_s=fresh, clock=self._clock.monotonic) for name, (question, fresh) in questions.items()
        }

    def settings(self) -> dict[str, Any]:
        """What does not change while the page is served."""
        sources = self._sources
        return {
            "state": str(sources.state), "run": str(sources.run), "repository": str(sources.repository),
            "servers": list(sources.servers), "metrics": sources.metrics,
            "objective_s": self._objective_s, "psi_look": self._psi[0], "psi_act": self._psi[1],
        }

    async def look(self) -> dict[str, dict[str, Any]]:
        """Every part {data, fault, asked_ms, number, waiting_s}; `replicas` has one for each server, `chain` is of them all."""
        names = list(self._parts)
        answers = dict(zip(names, await asyncio.gather(*(self._parts[name].look() for name in names)), strict=True))
        found = {name: self._told(name, answer) for name, answer in answers.items() if not name.startswith("replica ")}
        replicas = [
            {"server": replica.address, **self._told(f"replica {replica.address}", answers[f"replica {replica.address}"])}
            for replica in self._replicas
        ]
        found["replicas"] = {"data": replicas, "fault": None, "number": sum(replica["number"] for replica in replicas)}
        found["chain"] = {"data": self._chain(answers), "fault": None}
        return found

    def _told(self, name: str, answer: Answer) -> dict[str, Any]:
        waiting = self._parts[name].waiting_s
        return {"data": answer.data, "fault": answer.fault, "number": answer.number,
                "waiting_s": int(waiting) if waiting is not None and waiting >= 1 else None}

    def _answered(self) -> list[int]:
        """Versions with which replicas answered last, ascending."""
        answers = (self._parts[f"replica {replica.address}"].answer.data for replica in self._replicas)
        return sorted({data["version"] for data in answers if data is not None})

    def _chain(self, answers: dict[str, Answer]) -> dict[str, Any]:
        def mark(part: str, key: str) -> int | None:
            data = answers[part].data
            return data.get(key) if isinstance(data, dict) else None

        stream = answers["stream"].data or {}
        replicas = [answers[f"replica {replica.address}"].data for replica in self._replicas]
        answering = [data for data in replicas if data is not None]
        loaded = [data["loaded_watermark"] for data in answering]
        marks = {
            **(stream.get("marks") or {}),
            "trained": mark("checkpoint", "watermark"),
            "exported": mark("releases", "watermark"),
            "loaded": min(loaded) if loaded and None not in loaded else None,
        }
        newest = marks.get("event")
        clock_ms = self._log.look(newest, stream.get("session_sequence", 0))
        return chain(marks, [data["watermark"] for data in answering], clock_ms=clock_ms, live=self._log.live,
                     factor=self._log.factor, wall_ms=self._clock.wall_ms(), objective_s=self._objective_s) | {
                         "jumps": self._log.jumps}

    async def users(self, prefix: str) -> list[str]:
        """Ids to suggest. Raises OneRecError where there is no state."""
        return await asyncio.wait_for(asyncio.to_thread(self._state.suggestions, prefix), USER_SECONDS)

    async def random_user(self) -> str | None:
        """Somebody of the newest sessions; None where there is none yet."""
        users = await asyncio.wait_for(asyncio.to_thread(self._state.recent_users), USER_SECONDS)
        return self._generator.choice(users) if users else None

    async def user(self, user_id: str) -> dict[str, Any]:
        """What a user has watched, and what he is recommended now; each with its own fault."""
        watched, recommended = await asyncio.gather(self._apart(self._state.user, user_id), self._recommended(user_id))
        if isinstance(recommended["data"], dict):
            ids = [item for session in recommended["data"]["sessions"] for item in session["items"]]
            named = await self._apart(self._state.items, list(dict.fromkeys(ids)))
            recommended["data"]["items"] = {entry["item_id"]: entry for entry in named["data"] or []}
        return {"user_id": user_id, "watched": watched, "recommended": recommended}

    async def _recommended(self, user_id: str) -> dict[str, Any]:
        """From the first replica that answers; those that look down are asked last."""
        faults: list[str] = []
        for replica in sorted(self._replicas, key=lambda each: self._parts[f"replica {each.address}"].answer.data is None):
            told = await self._apart(replica.recommend, user_id)
            answer = told["data"]
            if answer is not None:
                rewards = answer.rewards or [None] * len(answer.items)
                sessions = [
                    {"items": items, "score": score, "rewards": reward}
                    for items, score, reward in zip(answer.items, answer.scores, rewards, strict=True)
                ]
                return {"data": {"server": replica.address, "version": answer.model_version, "watermark": answer.watermark,
                                 "sessions": sessions}, "fault": None}
            faults.append(told["fault"])
        return {"data": None, "fault": "; ".join(dict.fromkeys(faults)) or "no server is named: give --server HOST:PORT"}

    async def _apart(self, question: Callable[..., Any], argument: str | Sequence[str]) -> dict[str, Any]:
        """One question in a thread; a failure becomes its reason."""
        try:
            return {"data": await asyncio.wait_for(asyncio.to_thread(question, argument), USER_SECONDS), "fault": None}
        except TimeoutError:
            return {"data": None, "fault": f"no answer within {USER_SECONDS:.0f} s"}
        except Exception as error:
            return {"data": None, "fault": reason(error)}

    def close(self) -> None:
        """Lets go of the state and of the replicas."""
        self._state.close()
        for replica in self._replicas:
            replica.close()
