"""A log handed over part by part, with something done in between."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reference_log import SETTINGS, T0, Reference, reference, write
from stack import Stack

from onerec.config import load_config
from streaming.core import Core


@dataclass(frozen=True)
class Parts:
    """Files to produce one after the other, how many valid events the stream has seen after each, and the reference of all."""

    files: list[Path]
    events: list[int]
    wanted: Reference

    def produce(self, stack: Stack, number: int, *, end: bool = False) -> None:
        """Produces a part."""
        stack.produce(self.files[number], options=["--end"] if end else [])

    def settle(self, stack: Stack, number: int, seconds: float = 60) -> float:
        """Waits until all events of the parts up to `number` are applied; seconds it took."""
        return stack.wait(lambda: stack.events() >= self.events[number], seconds, f"all of part {number}", data=True)

    def feed(self, stack: Stack, number: int, seconds: float = 60) -> float:
        """Produces a part and waits until it is applied."""
        self.produce(stack, number)
        return self.settle(stack, number, seconds)


def make_parts(folder: Path, found: Sequence[bytes], cuts: Sequence[int]) -> Parts:
    """Parts of a log, cut before these lines."""
    core = Core(load_config(None, list(SETTINGS)).semantics)
    files, events = [], []
    for number, (start, end) in enumerate(zip((0, *cuts), (*cuts, len(found)), strict=True)):
        files.append(folder / f"part{number}.jsonl")
        write(files[-1], found[start:end])
        core.apply([(None, line) for line in found[start:end]], T0 * 2)
        events.append(core.counters.events)
    write(folder / "log.jsonl", found)
    with tempfile.TemporaryDirectory() as state:
        return Parts(files, events, reference(folder / "log.jsonl", Path(state) / "state"))


def even_cuts(count: int, parts: int) -> list[int]:
    """Where to cut `count` lines into so many parts."""
    return [count * number // parts for number in range(1, parts)]
