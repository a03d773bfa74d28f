"""One worker of the stream: topics checked, store opened, engine run, standby copies beside it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from onerec.errors import OneRecError
from streaming.kafka import topics
from streaming.kafka.engine import Engine
from streaming.kafka.partitions import Commit, PartitionStore, Step
from streaming.kafka.settings import KafkaConfig
from streaming.semantics import Semantics

TOPICS: Final = ("events", "sessions", "histories", "progress", "dead-letters")
STANDBY_SECONDS: Final = 1.0
RELEASE_SECONDS: Final = 10.0
"""After a request to stop: then writes on their way are given up; after as much again the process ends."""

EngineName = Literal["faust", "group"]


class Runner(Protocol):
    """What drives an `Engine`."""

    def run(self) -> None:
        """Until told to stop, or to the end. Raises Failure where the worker cannot go on."""


def _runner(name: EngineName, engine: Engine) -> Runner:
    if name == "faust":
        from streaming.kafka.app import StreamApp

        return StreamApp(engine)
    from streaming.kafka.group import Group

    return Group(engine)


def work(
    state: Path,
    semantics: Semantics,
    config: KafkaConfig,
    *,
    engine: EngineName = "faust",
    standby: bool = False,
    until_end: bool = False,
    show: Callable[[Engine], None] = lambda engine: None,
    on_step: Step = lambda step, partition: None,
    on_commit: Callable[[Commit], None] = lambda commit: None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Runs a worker until `stop` is set (or, with `until_end`, to the end of the log); gives the summary of §9 by partitions.

    Raises UserError for topics, settings or a state that do not fit, Failure where it has to leave.
    """
    topics.require(config, TOPICS)
    stop = stop or threading.Event()
    with _released(stop) as release, PartitionStore(
        state, semantics, config, on_step=on_step, on_commit=on_commit
    ) as store:
        driven = Engine(store, config, until_end=until_end, stop=stop, show=show)
        release.append(driven.release)
        try:
            with _standby(store, driven, config) if standby else nullcontext():
                _runner(engine, driven).run()
                return driven.summary()
        finally:
            driven.close()


@contextmanager
def _released(stop: threading.Event) -> Iterator[list[Callable[[], None]]]:
    """Sees to it that a worker told to stop does so, also while it waits for a broker that is away.

    First it calls what the list holds then, which gives up the writes on their way; at last it ends the process, which is as
    good as a kill at that moment: what was not committed is applied again by the next owner.
    """
    done = threading.Event()
    release: list[Callable[[], None]] = []

    def wait() -> None:
        stop.wait()
        if done.wait(RELEASE_SECONDS):
            return
        for call in release:
            call()
        if not done.wait(RELEASE_SECONDS):
            sys.stderr.write("onerec: left without waiting any longer for Kafka, which does not answer; nothing is lost\n")
            sys.stderr.flush()
            os._exit(0)

    threading.Thread(target=wait, name="release", daemon=True).start()
    try:
        yield release
    finally:
        done.set()


@contextmanager
def _standby(store: PartitionStore, engine: Engine, config: KafkaConfig) -> Iterator[None]:
    """A thread that keeps the copies of partitions held by others fresh."""
    done = threading.Event()

    def follow() -> None:
        said = ""
        while not done.is_set():
            try:
                store.standby([p for p in range(config.partitions) if not engine.holds(p)], STANDBY_SECONDS)
            except OneRecError as error:
                if str(error) != said:
                    said = str(error)
                    sys.stderr.write(f"onerec: standby copies: {said}\n")
                done.wait(STANDBY_SECONDS)

    thread = threading.Thread(target=follow, name="standby")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[list[int]]:
    """SIGTERM and SIGINT set `stop`; the list then holds the signal's number."""
    received: list[int] = []

    def take(number: int, frame: types.FrameType | None) -> None:
        received.append(number)
        stop.set()

    before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
