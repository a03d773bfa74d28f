"""What a wait that was in vain is called: slow where something still came, a fault where nothing did."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import stack as module
from patience import TooSlow
from stack import Stack, StackError


class Moving(Stack):
    """A stream that gets on at every look."""

    def state(self) -> str:
        return str(next(self.steps))

    steps = itertools.count()


def test_data_that_stopped_coming_are_never_called_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STANDSTILL", 0.01)
    with Stack(tmp_path, "127.0.0.1:1") as still, pytest.raises(StackError, match="events: not within"):
        still.wait(lambda: False, 0.1, "events", data=True)
    with Moving(tmp_path, "127.0.0.1:1") as moving, pytest.raises(TooSlow, match="events: not within"):
        moving.wait(lambda: False, 0.1, "events", data=True)
    assert not issubclass(StackError, TooSlow)


def test_a_process_that_does_not_get_there_is_slow(tmp_path: Path) -> None:
    with Stack(tmp_path, "127.0.0.1:1") as stack, pytest.raises(TooSlow, match="to freeze: not within"):
        stack.wait(lambda: False, 0.1, "to freeze")
