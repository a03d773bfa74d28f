"""Python's cyclic garbage collector, set for processes that hold many small live objects and make few cycles."""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 200_000
"""New containers before the young are looked through; Python's 700 costs the stream's core 11 % and encoding sessions 50 %."""


def calm() -> None:
    """Looks seldom, and never again at what is there now. For a command at its start; reference counting frees the rest."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 50)
