"""The Triton model repository on disk: versions, what was set aside, the lock, and the record of what happened.

    REPOSITORY/recommend/config.pbtxt, REPOSITORY/recommend/<version>/     what Triton reads
    REPOSITORY/.onerec/{staging,rejected,templates}/, versions.jsonl, lock  what publishers keep

The folders are the truth: Triton serves the two highest versions that are there. A version appears by one rename and
goes by one rename, so a process killed at any moment leaves no half version.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from exporter.bundle import Manifest, read_manifest, sync_tree, verify_bundle
from exporter.triton_config import MODEL_NAME, SERVED_VERSIONS, RecommendConfig, config_text
from onerec.errors import Failure, UserError
from onerec.files import sync_path

KEEP_VERSIONS = 3
KEEP_REJECTED = 3
KEEP_EVENTS = 1_000
"""Lines of versions.jsonl that stay when it is shortened, which happens at twice as many."""
REASON_FILE = "reason.txt"


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of versions.jsonl; `recovered`: complete on disk, but its publisher was killed before it said so."""

    event: Literal["published", "recovered", "rejected", "rolled back"]
    version: int
    at_ms: int
    step: int | None = None
    watermark: int | None = None
    reason: str = ""


class VersionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `onerec versions`: `state` as the folders say; times in ms, None where not known."""

    version: int
    state: Literal["serving", "previous", "kept", "rejected", "rolled back", "gone"]
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
        self.templates = private / "templates"
        self._journal = private / "versions.jsonl"
        self._lock = private / "lock"

    def folder(self, version: int) -> Path:
        """REPOSITORY/recommend/<version>."""
        return self.model / str(version)

    def versions(self) -> list[int]:
        """Versions on disk, ascending."""
        if not self.model.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.model.iterdir() if entry.is_dir() and entry.name.isdigit())

    def next_version(self) -> int:
        """One more than any version ever used here, set aside ones included: a number means one bundle for good."""
        rejected = [int(entry.name) for entry in _folders(self.rejected) if entry.name.isdigit()]
        return 1 + max([0, *self.versions(), *rejected, *(event.version for event in self.events())])

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

    @contextmanager
    def lock(self, *, wait_seconds: float = 0.0) -> Iterator[None]:
        """The one publisher at a time; released by the system when its process ends, however it ends.

        Raises Failure naming the process that holds it, UserError where the repository cannot be written.
        """
        with self.writing():
            for folder in (self.staging, self.rejected, self.templates, self.model):
                folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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
                            f"repository {self.root}: another publisher, or a server that starts, is at work "
                            f"(process {holder}); try again when it is done"
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
        for leftover in [*_folders(self.staging), *self.templates.glob(".*"), *self.templates.glob("*/.*")]:
            shutil.rmtree(leftover, ignore_errors=True)

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

    def record(
        self, event: Literal["published", "recovered", "rejected", "rolled back"], version: int, now: float,
        manifest: Manifest | None, reason: str = "",
    ) -> None:  # fmt: skip
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
        self.record(event, version, now, _manifest_or_none(target), reason)
        numbers = sorted(int(entry.name) for entry in _folders(self.rejected) if entry.name.isdigit())
        for old in numbers[:-KEEP_REJECTED]:
            shutil.rmtree(self.rejected / str(old), ignore_errors=True)
        return target

    def recover(self, now: float) -> dict[int, str]:
        """Settle what a killed publisher left behind: staging goes, a version without a record is verified and
        recorded, or set aside. Only under the lock; returns the reasons by version set aside."""
        self.clean_staging()
        refused: dict[int, str] = {}
        known = {event.version for event in self.events() if event.event in ("published", "recovered")}
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
        """Delete all but the newest versions; renamed away first, so that no half version is ever seen."""
        with self.writing():
            for version in self.versions()[:-KEEP_VERSIONS]:
                doomed = self.staging / f"old-{version}"
                self.folder(version).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def infos(self) -> list[VersionInfo]:
        """Every version that is or was here, newest first."""
        events: dict[int, Event] = {event.version: event for event in self.events()}
        present = self.versions()
        found = []
        for version in sorted({*events, *present}, reverse=True):
            last = events.get(version)
            folder = self.folder(version) if version in present else self.rejected / str(version)
            manifest = _manifest_or_none(folder)
            if version in present:
                place = len(present) - 1 - present.index(version)
                state = ("serving", "previous")[place] if place < SERVED_VERSIONS else "kept"
            elif last and last.event in ("rejected", "rolled back"):
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


def _folders(parent: Path) -> list[Path]:
    return [entry for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []


def _manifest_or_none(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except UserError:
        return None
