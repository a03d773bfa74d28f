"""How commands end on SIGTERM and Ctrl-C."""

from __future__ import annotations

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from onerec.console import err


@contextmanager
def interruptible(said: str) -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, at once: `said` is printed, the exit status is 130."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        err.print(said)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stopping(said: str | None = None) -> Iterator[list[int]]:
    """A list that is filled by SIGTERM or SIGINT, which prints `said`; a second signal ends the process at once."""
    stop: list[int] = []

    def handle(number: int, frame: types.FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop.append(number)
        if said is not None:
            err.print(said)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
