"""Seconds of each step of a publish, told to whoever asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, float], None]
"""Called with the name and the wall-clock seconds of a step as it ends."""


def silent(step: str, seconds: float) -> None:
    """Report nothing."""


@contextmanager
def timed(report: Report, name: str) -> Iterator[None]:
    """Report how long the block took, if it ended well."""
    start = time.perf_counter()
    yield
    report(name, time.perf_counter() - start)
