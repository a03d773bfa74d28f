"""What was held back by the gate, and whether publishing is on hold: written by publishers, read by whoever shows it.

No torch in here: dashboards and monitors read it every second.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from exporter.bundle import GateScores, Manifest
from exporter.repository import Repository, VersionInfo, manifest_or_none
from onerec.errors import Failure, UserError

HELD_FILE = "held.json"
"""Beside a candidate's bundle, not part of it."""
Note = TypeVar("Note", bound=msgspec.Struct)


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that was held back, as .onerec/held/VERSION/held.json says: why, and what the gate found."""

    version: int
    reason: str
    at_ms: int
    step: int | None = None
    watermark: int | None = None
    scores: GateScores | None = None


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """Publishing is on hold since `at_ms`: `left` were taken back for `serving`, and why."""

    reason: str
    at_ms: int
    left: list[int]
    serving: int


class First(msgspec.Struct, frozen=True, kw_only=True):
    """The first version that was ever loaded here: at which wall-clock time, and the newest event of the log then.

    What happened before had nothing that could answer, so its age at a release says nothing.
    """

    version: int
    at_ms: int
    newest_event_ms: int | None


class ReleaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator wants to know of a repository. `held`: newest first, those that are still there; `failed`: the newest
    candidate was held back, and nothing that came after it was published with other weights; `serving`: the newest version
    in place; `weights_at_ms`: when the newest version that brought other weights was made.
    """

    serving: int | None
    hold: Hold | None
    held: list[Held]
    failed: bool
    first: First | None
    weights_at_ms: int | None
    manifest: Manifest | None
    versions: list[VersionInfo]


class HeldBack(Failure):
    """A candidate did not pass the gate. The builder raises it with the sealed bundle in its staging folder."""

    def __init__(
        self, reason: str, manifest: Manifest, scores: GateScores | None = None, told: str | None = None
    ) -> None:
        super().__init__(told or reason)
        self.reason, self.manifest, self.scores = reason, manifest, scores


class OnHold(Failure):
    """Nothing is published until somebody promotes."""


def status(repository: Path) -> ReleaseStatus:
    """How releases stand; of a folder that is no repository, nothing. Reads small files only, changes nothing."""
    place = Repository(repository)
    versions = place.versions()
    manifest = manifest_or_none(place.folder(versions[-1])) if versions else None
    held = held_versions(place)
    brought = manifest.weights_ms if manifest else None
    return ReleaseStatus(
        serving=versions[-1] if versions else None,
        hold=read_hold(place),
        held=held,
        failed=bool(held) and (brought is None or held[0].at_ms > brought),
        first=_read(place.first_file, First),
        weights_at_ms=brought,
        manifest=manifest,
        versions=place.infos(),
    )


def held_versions(place: Repository) -> list[Held]:
    """Candidates in .onerec/held, newest first; a note that is damaged says so in its reason."""
    found = []
    for folder in place.held.iterdir() if place.held.is_dir() else ():
        if folder.name.isdigit():
            unread = Held(version=int(folder.name), reason=f"{folder / HELD_FILE} cannot be read", at_ms=0)
            found.append(_read(folder / HELD_FILE, Held) or unread)
    return sorted(found, key=lambda entry: -entry.version)


def hold_back(place: Repository, staged: Path, version: int, fault: HeldBack, now: float) -> Path:
    """Keep a candidate aside with its reason and its scores; both appear together."""
    note = Held(
        version=version, reason=fault.reason, at_ms=int(now * 1000), step=fault.manifest.step,
        watermark=fault.manifest.watermark, scores=fault.scores,
    )  # fmt: skip
    with place.writing():
        (staged / HELD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(note)) + b"\n")
    return place.hold_back(staged, version, fault.reason, now)


def read_hold(place: Repository) -> Hold | None:
    """The hold, None where there is none. One that cannot be read still holds: somebody wanted publishing to stop."""
    if not place.hold_file.exists():
        return None
    unread = Hold(reason=f"{place.hold_file} cannot be read", at_ms=0, left=[], serving=0)
    return _read(place.hold_file, Hold) or unread


def check_hold(place: Repository) -> None:
    """Raises OnHold, with the reason and the remedy, where publishing is on hold."""
    if (hold := read_hold(place)) is not None:
        left = ", ".join(map(str, hold.left)) or "?"
        raise OnHold(
            f"repository {place.root}: publishing is on hold since version {left} was rolled back ({hold.reason}); "
            f'lift it: onerec promote --repository {place.root} --reason "..."'
        )


def begin_hold(place: Repository, reason: str, left: list[int], serving: int, now: float) -> None:
    """Nothing is published from now on until `lift_hold`."""
    hold = Hold(reason=reason, at_ms=int(now * 1000), left=left, serving=serving)
    place.write_note(place.hold_file, msgspec.json.encode(hold) + b"\n")


def lift_hold(place: Repository) -> None:
    """Publishing goes on."""
    with place.writing():
        place.hold_file.unlink(missing_ok=True)


def note_first(place: Repository, version: int, now: float, newest_event_ms: int | None) -> None:
    """Write down the first version that was loaded; later calls change nothing."""
    if not place.first_file.exists():
        first = First(version=version, at_ms=int(now * 1000), newest_event_ms=newest_event_ms)
        place.write_note(place.first_file, msgspec.json.encode(first) + b"\n")


def reason_given(reason: str) -> str:
    """A reason worth keeping; UserError for an empty one."""
    if not (text := " ".join(reason.split())):
        raise UserError("--reason is empty; say in a few words why, it is kept with the version")
    return text[:500]


def _read(path: Path, kind: type[Note]) -> Note | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
