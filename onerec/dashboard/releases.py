"""What the page asks of the model repository: its versions, what is held back, and the lineage of what answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.lineage import lineage
from exporter.release import status
from onerec.errors import OneRecError, UserError

VERSIONS_SHOWN: Final = 12
HELD_SHOWN: Final = 5


class ReleasesView:
    """A repository; nothing in it is written or locked."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def look(self, answered: list[int]) -> dict[str, Any]:
        """Versions, newest first, holds, and the lineage of the versions `answered` with, else of the newest.

        Raises UserError where there is no repository.
        """
        if not self._root.is_dir():
            raise UserError(f"repository {self._root}: there is none; `onerec publish --repository {self._root}` makes it")
        found = status(self._root)
        told = answered or ([] if found.serving is None else [found.serving])
        return {
            "newest": found.serving,
            "watermark": found.manifest.watermark if found.manifest else None,
            "unread": found.serving is not None and found.manifest is None,
            "answers": bool(answered),
            "lineages": [self._lineage(version) for version in told],
            "versions": msgspec.to_builtins(found.versions[:VERSIONS_SHOWN]),
            "held": msgspec.to_builtins(found.held[:HELD_SHOWN]),
            "gate_failed": found.failed,
            "hold": msgspec.to_builtins(found.hold),
        }

    def _lineage(self, version: int) -> dict[str, Any]:
        try:
            return {"version": version, "facts": lineage(self._root, version), "fault": None}
        except OneRecError as error:
            return {"version": version, "facts": None, "fault": str(error)}
