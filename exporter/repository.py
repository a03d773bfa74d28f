"""The Triton model repository on disk: versions, what was set aside, the lock, and the record of what happened.

    REPOSITORY/recommend/config.pbtxt, REPOSITORY/recommend/<version>/     what Triton reads
    REPOSITORY/.onerec/{staging,rejected,held,templates}/, versions.jsonl, hold.json, first.json, lock, publisher

The folders are the truth: Triton serves the two highest versions that are there. A version appears by one rename and
goes by one rename, so a process killed at any moment leaves no half version. Below `.onerec` lies what publishers keep;
`lock` is held while something is changed, `publisher` as long as somebody publishes here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from exporter.bundle import Manifest, read_manifest, sync_tree, verify_bundle
from exporter.triton_config import MODEL_NAME, SERVED_VERSIONS, RecommendConfig, config_text
from onerec.errors import Failure, UserError
from onerec.files import sync_path

KEEP_VERSIONS = 3
"""Versions of different weights that stay on disk, of each the newest; the served ones stay in any case."""
KEEP_REJECTED = 3
KEEP_HELD = 3
KEEP_EVENTS = 1_000
"""Lines of versions.jsonl that stay when it is shortened, which happens at twice as many."""
REASON_FILE = "reason.txt"

What = Literal["published", "recovered", "rejected", "held", "promoted", "rolled back", "hold lifted"]


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of versions.jsonl; `recovered`: complete on disk, but its publisher was killed before it said so.

    `promoted`: put in place by hand, with a reason; `hold lifted`: publishing goes on after a rollback, `version` serves.
    """

    event: What
    version: int
    at_ms: int
    step: int | None = None
    watermark: int | None = None
    reason: str = ""


class VersionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `onerec versions`: `state` as the folders say; times in ms, None where not known."""

    version: int
    state: Literal["serving", "previous", "kept", "held", "rejected", "rolled back", "gone"]
    step: int | None
    watermark: int | None
    created_ms: int | None
    items: int | None
    codebook_version: str | None
    reason: str


class Repository:
    """A model repository with its publishers' folder beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = root / MODEL_NAME
        private = root / ".onerec"
        self.staging = private / "staging"
        self.rejected = private / "rejected"
        self.held = private / "held"
        self.templates = private / "templates"
        self.tracing = private / "tracing"
        self._journal = private / "versions.jsonl"
        self._lock = private / "lock"
        self._publisher = private / "publisher"
        self.hold_file = private / "hold.json"
        self.first_file = private / "first.json"

    def folder(self, version: int) -> Path:
        """REPOSITORY/recommend/<version>."""
        return self.model / str(version)

    def versions(self) -> list[int]:
        """Versions on disk, ascending."""
        return _numbers(self.model)

    def next_version(self) -> int:
        """One more than any version ever used here, set aside ones included: a number means one bundle for good."""
        aside = [*_numbers(self.rejected), *_numbers(self.held)]
        return 1 + max([0, *self.versions(), *aside, *(event.version for event in self.events())])

    def events(self) -> list[Event]:
        """What happened here, oldest first; a line torn by a crash is left out."""
        try:
            lines = self._journal.read_bytes().splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                found.append(msgspec.json.decode(line, type=Event))
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
        return found

    def lock(self, *, wait_seconds: float = 0.0) -> AbstractContextManager[None]:
        """The one process that changes the repository; released by the system when it ends, however it ends.

        Raises Failure naming the process that holds it, UserError where the repository cannot be written.
        """
        return self._locked(self._lock, wait_seconds, "another publisher, or a server that starts, is at work")

    def publisher(self) -> AbstractContextManager[None]:
        """The one publisher, for as long as it lives; between two versions others may roll back and promote.

        Raises as `lock` does.
        """
        return self._locked(self._publisher, 0.0, "another publisher is at work")

    @contextmanager
    def _locked(self, path: Path, wait_seconds: float, fault: str) -> Iterator[None]:
        with self.writing():
            for folder in (self.staging, self.rejected, self.held, self.templates, self.model):
                folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + wait_seconds
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() >= deadline:
                        holder = os.pread(handle, 64, 0).decode(errors="replace").strip() or "unknown"
                        raise Failure(
                            f"repository {self.root}: {fault} (process {holder}); try again when it is done"
                        ) from None
                    time.sleep(0.05)
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns what the file system refuses into words; nothing that Triton reads has changed then."""
        try:
            yield
        except OSError as error:
            place = error.filename or self.root
            text = f"repository {self.root} cannot be written: {error.strerror or error} ({place})"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise Failure(f"{text}; free space, then publish again; the served version is as it was") from error
            raise UserError(f"{text}; name a folder that you may write, or mend its permissions") from error

    def new_staging(self, version: int) -> Path:
        """An empty folder to build a version in."""
        with self.writing():
            folder = self.staging / f"{version}-{os.getpid()}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return folder

    def clean_staging(self) -> None:
        """Remove what killed publishers left; only under the lock."""
        for leftover in [*_entries(self.staging), *self.templates.glob(".*"), *self.templates.glob("*/.*")]:
            shutil.rmtree(leftover, ignore_errors=True)

    @property
    def configured(self) -> bool:
        """Whether there is a config.pbtxt."""
        return (self.model / "config.pbtxt").is_file()

    def write_config(self, config: RecommendConfig) -> None:
        """Write config.pbtxt where it differs; Triton reloads every version when it does, so not needlessly."""
        path, text = self.model / "config.pbtxt", config_text(config)
        with self.writing():
            if path.exists() and path.read_text(encoding="utf-8") == text:
                return
            fresh = self.staging / "config.pbtxt"
            fresh.write_text(text, encoding="utf-8")
            sync_path(fresh)
            fresh.replace(path)
            sync_path(self.model)

    def install(self, staged: Path, version: int) -> None:
        """Make a staged version visible in one step; its bytes are on the disk before its name is."""
        with self.writing():
            sync_tree(staged)
            staged.rename(self.folder(version))
            sync_path(self.model)

    def record(self, event: What, version: int, now: float, manifest: Manifest | None, reason: str = "") -> None:
        """Append a line to versions.jsonl and force it to the disk."""
        line = Event(
            event=event,
            version=version,
            at_ms=int(now * 1000),
            step=manifest.step if manifest else None,
            watermark=manifest.watermark if manifest else None,
            reason=reason,
        )
        with self.writing(), self._journal.open("ab+") as file:
            # A line that a crash tore must not swallow this one.
            file.seek(0, os.SEEK_END)
            torn = b""
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = b"" if file.read(1) == b"\n" else b"\n"
            file.write(torn + msgspec.json.encode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
        if len(lines) > 2 * KEEP_EVENTS:
            with self.writing():
                fresh = self.staging / "versions.jsonl"
                fresh.write_bytes(b"".join(lines[-KEEP_EVENTS:]))
                sync_path(fresh)
                fresh.replace(self._journal)

    def set_aside(
        self, version: int, reason: str, now: float, *, event: Literal["rejected", "rolled back"] = "rejected"
    ) -> Path:
        """Move a version out of Triton's sight into .onerec/rejected, the reason beside it; the newest few stay."""
        target = self.rejected / str(version)
        with self.writing():
            shutil.rmtree(target, ignore_errors=True)
            self.folder(version).rename(target)
            sync_path(self.model)
            (target / REASON_FILE).write_text(reason + "\n", encoding="utf-8")
        self.record(event, version, now, manifest_or_none(target), reason)
        _keep_newest(self.rejected, KEEP_REJECTED)
        return target

    def hold_back(self, staged: Path, version: int, reason: str, now: float) -> Path:
        """Keep a sealed candidate in .onerec/held instead of showing it to Triton; the newest few stay."""
        target = self.held / str(version)
        with self.writing():
            sync_tree(staged)
            shutil.rmtree(target, ignore_errors=True)
            staged.rename(target)
            sync_path(self.held)
        self.record("held", version, now, manifest_or_none(target), reason)
        _keep_newest(self.held, KEEP_HELD)
        return target

    def write_note(self, path: Path, content: bytes) -> None:
        """Replace a small file below .onerec in one step, forced to the disk."""
        with self.writing():
            fresh = self.staging / path.name
            fresh.write_bytes(content)
            sync_path(fresh)
            fresh.replace(path)
            sync_path(path.parent)

    def recover(self, now: float) -> dict[int, str]:
        """Settle what a killed publisher left behind: staging goes, a version without a record is verified and
        recorded, or set aside. Only under the lock; returns the reasons by version set aside."""
        self.clean_staging()
        refused: dict[int, str] = {}
        known = {event.version for event in self.events() if event.event in ("published", "recovered", "promoted")}
        for version in self.versions():
            if version in known:
                continue
            try:
                manifest = verify_bundle(self.folder(version))
            except UserError as error:
                refused[version] = str(error)
                self.set_aside(version, refused[version], now)
            else:
                self.record("recovered", version, now, manifest)
        return refused

    def prune(self) -> None:
        """Delete old versions; renamed away first, so that no half version is ever seen.

        The newest of each of the newest KEEP_VERSIONS weights stay, however many catalogues came since: there must be
        other weights to roll back to.
        """
        versions = self.versions()
        kept, weights = set(versions[-SERVED_VERSIONS:]), set[str]()
        for version in reversed(versions):
            manifest = manifest_or_none(self.folder(version))
            name = manifest.weights if manifest else f"damaged {version}"
            if name not in weights and len(weights) < KEEP_VERSIONS:
                kept.add(version)
            weights.add(name)
        with self.writing():
            for version in versions:
                if version not in kept:
                    doomed = self.staging / f"old-{version}"
                    self.folder(version).rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)

    def infos(self) -> list[VersionInfo]:
        """Every version that is or was here, newest first."""
        events: dict[int, Event] = {event.version: event for event in self.events()}
        present = self.versions()
        folders = {version: parent / str(version) for parent in (self.rejected, self.held, self.model)
                   for version in _numbers(parent)}  # fmt: skip
        found = []
        for version in sorted({*events, *present}, reverse=True):
            last = events.get(version)
            manifest = manifest_or_none(folders[version]) if version in folders else None
            if version in present:
                place = len(present) - 1 - present.index(version)
                state = ("serving", "previous")[place] if place < SERVED_VERSIONS else "kept"
            elif last and last.event in ("held", "rejected", "rolled back"):
                state = last.event
            else:
                state = "gone"
            found.append(
                VersionInfo(
                    version=version,
                    state=state,  # type: ignore[arg-type]
                    step=manifest.step if manifest else last.step if last else None,
                    watermark=manifest.watermark if manifest else last.watermark if last else None,
                    created_ms=manifest.created_ms if manifest else last.at_ms if last else None,
                    items=manifest.items if manifest else None,
                    codebook_version=manifest.codebook_version if manifest else None,
                    reason=last.reason if last else "",
                )
            )
        return found


def _numbers(parent: Path) -> list[int]:
    """Versions that lie in a folder, ascending."""
    if not parent.is_dir():
        return []
    return sorted(int(entry.name) for entry in parent.iterdir() if entry.is_dir() and entry.name.isdigit())


def _entries(parent: Path) -> list[Path]:
    return list(parent.iterdir()) if parent.is_dir() else []


def _keep_newest(parent: Path, count: int) -> None:
    for old in _numbers(parent)[:-count]:
        shutil.rmtree(parent / str(old), ignore_errors=True)


def manifest_or_none(folder: Path) -> Manifest | None:
    """The manifest of a bundle; None where there is none that can be read."""
    try:
        return read_manifest(folder)
    except UserError:
        return None
