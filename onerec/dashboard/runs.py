"""What the page asks of a training run's folder: newest checkpoint, curves, versions first answered."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, Final

import msgspec

from onerec.dashboard.curves import TrainingCurves
from onerec.dashboard.tail import Tail
from onerec.errors import Failure, UserError
from onerec.monitor.ledger import LEDGER_FILE
from onerec.monitor.looks import RunLook
from trainer.evaluate import Line

LEDGER_LINES: Final = 400


class RunView:
    """Reads on in a run's files. Every method is for one thread at a time."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._look = RunLook(run_dir)
        self._metrics = Tail(run_dir / "metrics.jsonl")
        self._curves = TrainingCurves()
        self._decoder = msgspec.json.Decoder(Line)
        self._ledger = Tail(run_dir / LEDGER_FILE)
        self._versions: deque[dict[str, Any]] = deque(maxlen=LEDGER_LINES)

    def checkpoint(self) -> dict[str, Any]:
        """Step, watermark and time of the newest checkpoint; all None before the first. UserError without the folder."""
        if not self._run_dir.is_dir():
            raise UserError(f"run {self._run_dir}: there is none; `onerec train --run {self._run_dir}` makes it")
        marks = self._look.look()
        if self._look.fault:
            raise Failure(self._look.fault)
        return msgspec.to_builtins(marks)

    def curves(self) -> dict[str, Any] | None:
        """Hit rates and losses so far; None before the first step."""
        anew, lines = self._metrics.read()
        if anew:
            self._curves = TrainingCurves()
        for line in lines:
            self._curves.add(self._decoder.decode(line))
        return self._curves.to_json()

    def ledger(self) -> list[dict[str, Any]] | None:
        """The newest versions that were answered with, oldest first; None where nobody has written of any."""
        anew, lines = self._ledger.read()
        if anew:
            self._versions.clear()
        for line in lines:
            entry = msgspec.json.decode(line)
            if isinstance(entry, dict):
                self._versions.append(entry)
        return list(self._versions) or None
