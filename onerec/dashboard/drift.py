"""Drift as the page shows it: the monitor's own measure against the reference that it keeps; nothing is written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.bundle import read_catalogue
from exporter.repository import Repository
from onerec.dashboard.state import StateView
from onerec.errors import OneRecError
from onerec.monitor.drift import DRIFT_FILE, Drift
from onerec.monitor.settings import MonitorConfig

CODES_SECONDS: Final = 60.0
"""Between two looks at the catalogue for the codes of new items: it may be large."""


class DriftView:
    """For one thread at a time."""

    def __init__(self, run_dir: Path, state: StateView, repository: Path, settings: MonitorConfig) -> None:
        self._path, self._state, self._settings = run_dir / DRIFT_FILE, state, settings
        self._repository = Repository(repository)
        self._kept: tuple[int, int] | None = None
        self._drift: Drift | None = None
        self._codes: dict[str, int] = {}
        self._codes_at: float | None = None

    def look(self) -> dict[str, Any] | None:
        """Indices by feature and the share of unseen items; None without a reference, or while a window is not full."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            self._kept, self._drift = None, None
            return None
        kept = found.st_ino, found.st_mtime_ns
        if kept != self._kept or self._drift is None:
            self._kept = kept
            self._drift = Drift(self._path, reference_sessions=self._settings.reference_sessions,
                                window_sessions=self._settings.window_sessions, code_of=self._code, write=False)
        self._read_codes()
        with self._state.open() as reader:
            drifted = self._drift.look(reader)
        return None if drifted is None else {"psi": drifted.indices(), **msgspec.to_builtins(drifted)}

    def _code(self, item_id: str) -> int | None:
        return self._codes.get(item_id)

    def _read_codes(self) -> None:
        """Level-1 codes of the newest version's catalogue; as they were where it cannot be read."""
        if self._codes_at is not None and time.monotonic() - self._codes_at < CODES_SECONDS:
            return
        versions = self._repository.versions()
        if not versions:
            return
        try:
            snapshot = read_catalogue(self._repository.folder(versions[-1]))
        except OneRecError:
            return
        self._codes = dict(zip(snapshot.item_ids, snapshot.item_codes[:, 0].tolist(), strict=True))
        self._codes_at = time.monotonic()
