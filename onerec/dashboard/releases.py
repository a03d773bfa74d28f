"""What the page asks of the model repository: its versions, why some are not served, and the newest one's lineage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from exporter.bundle import read_manifest
from exporter.repository import Repository
from onerec.errors import OneRecError, UserError

VERSIONS_SHOWN: Final = 12


class ReleasesView:
    """A repository; nothing in it is written or locked."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._repository = Repository(root)

    def look(self) -> dict[str, Any]:
        """Versions, newest first, and the manifest's facts of the newest. UserError where there is no repository."""
        if not self._root.is_dir():
            raise UserError(f"repository {self._root}: there is none; `onerec publish --repository {self._root}` makes it")
        versions = self._repository.versions()
        infos = self._repository.infos()[:VERSIONS_SHOWN]
        newest = versions[-1] if versions else None
        lineage, fault = None, None
        if newest is not None:
            try:
                lineage = self.lineage(newest)
            except OneRecError as error:
                fault = str(error)
        return {
            "newest": newest,
            "watermark": lineage["watermark"] if lineage else None,
            "versions": msgspec.to_builtins(infos),
            "lineage": lineage,
            "lineage_fault": fault,
        }

    def lineage(self, version: int) -> dict[str, Any]:
        """What a version was made of, as its manifest says."""
        record: dict[str, Any] = msgspec.to_builtins(read_manifest(self._repository.folder(version)))
        for bulky in ("files", "model_config", "reward"):
            record.pop(bulky, None)
        return record
