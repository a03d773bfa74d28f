"""What the page asks of a training run's folder: newest checkpoint, curves, versions first answered, drift."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, Final

import msgspec

from onerec.dashboard.curves import TrainingCurves
from onerec.dashboard.tail import Tail
from onerec.errors import UserError
from trainer.checkpoint import STATE_FILE, checkpoint_folder, checkpoint_steps
from trainer.evaluate import Line

LEDGER_LINES: Final = 400


class RunView:
    """Reads on in a run's files. Every method is for one thread at a time."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._metrics = Tail(run_dir / "metrics.jsonl")
        self._curves = TrainingCurves()
        self._decoder = msgspec.json.Decoder(Line)
        self._ledger = Tail(run_dir / "freshness.jsonl")
        self._versions: deque[dict[str, Any]] = deque(maxlen=LEDGER_LINES)

    def checkpoint(self) -> dict[str, Any]:
        """Step, watermark and time of the newest checkpoint; all None before the first. UserError without the folder."""
        if not self._run_dir.is_dir():
            raise UserError(f"run {self._run_dir}: there is none; `onerec train --run {self._run_dir}` makes it")
        steps = checkpoint_steps(self._run_dir)
        if not steps:
            return {"step": None, "watermark": None, "created_ms": None}
        record = msgspec.json.decode((checkpoint_folder(self._run_dir, steps[-1]) / STATE_FILE).read_bytes())
        return {"step": steps[-1], "watermark": record["watermark"], "created_ms": record["created_ms"],
                "score": record.get("score")}

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

    def drift(self) -> Any:
        """What `onerec monitor` found last; None where it has not looked."""
        try:
            return msgspec.json.decode((self._run_dir / "drift.json").read_bytes())
        except FileNotFoundError:
            return None
