"""From a version back to what it was made of: checkpoint, place in the log, codebook, configuration, code, gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from exporter.bundle import Manifest
from exporter.repository import Repository, manifest_or_none
from onerec.errors import UserError


def lineage(repository: Path, version: int | None = None) -> dict[str, Any]:
    """All that is known of a version (None: the newest), also of one that was held back or set aside.

    Keys: `version`, `state`, then those of the manifest without its list of files, then `history`: what happened to the
    version, oldest first. A value that is not known, as in versions of older formats, is None. Raises UserError where the
    repository knows no such version; of one whose folder is gone the record's own lines are all there is.
    """
    place = Repository(repository)
    infos = {info.version: info for info in place.infos()}
    if version is None:
        present = place.versions()
        if not present:
            raise UserError(f"repository {repository} holds no versions; publish one: onerec publish --run DIR")
        version = present[-1]
    if version not in infos:
        known = f"{min(infos)} to {max(infos)}" if infos else "none"
        raise UserError(f"repository {repository} knows no version {version}; it knows {known}")
    info = infos[version]
    manifest = manifest_of(place, version)
    found: dict[str, Any] = {"version": version, "state": info.state}
    if manifest is None:
        found |= {"step": info.step, "watermark": info.watermark}
    else:
        record = msgspec.to_builtins(manifest)
        found |= {key: value for key, value in record.items() if key not in ("files", "version")}
        found["weights_sha256"] = manifest.weights
    history = [msgspec.to_builtins(event) for event in place.events() if event.version == version]
    return {**found, "history": history}


def manifest_of(place: Repository, version: int) -> Manifest | None:
    """The manifest of a version wherever it lies; None where it is gone."""
    for folder in (place.folder(version), place.held / str(version), place.rejected / str(version)):
        if (manifest := manifest_or_none(folder)) is not None:
            return manifest
    return None


def answered(repository: Path, server: str) -> tuple[int, dict[str, Any]]:
    """(version, its lineage) of what Triton answers with now. Raises Failure where it does not answer."""
    from exporter.client import Client

    with Client(server) as client:
        version = client.recommend(history=[]).model_version
    return version, lineage(repository, version)
