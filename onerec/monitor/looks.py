"""Looking at state, run and repository again and again, cheaply: what has not changed is not read twice.

No look raises for a part that is missing, half there or damaged: its marks are then empty, and `fault` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from onerec.errors import OneRecError

if TYPE_CHECKING:
    from exporter.bundle import Manifest
    from exporter.release import ReleaseStatus
    from streaming.changes import Counters
    from streaming.store import Reader

T = TypeVar("T")

FAULTS = (OneRecError, OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError, UnicodeDecodeError)
SAMPLE_SESSIONS = 2_000
"""Sessions whose events are aged for one version; of more every k-th is taken."""
RECENT_SESSIONS = 64


class StateMarks(msgspec.Struct, frozen=True, kw_only=True):
    """How far the stream has come: event times in ms, and the log's counts; None where there is nothing.

    `newest`: the newest event taken. `watermark`: everything up to there has come. `session_end`: end of the newest
    session.
    """

    newest: int | None = None
    watermark: int | None = None
    session_end: int | None = None
    sequence: int = 0
    item_sequence: int = 0
    counters: Counters | None = None


class StateLook:
    """A reader that stays open, is opened anew when the state was moved or made anew, and waits for one to appear."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.fault = ""
        self.marks = StateMarks()
        self._reader: Reader | None = None
        self._identity: tuple[int, int] | None = None
        self._lateness = 0

    def look(self) -> StateMarks:
        """The state as it is now."""
        try:
            self.marks, self.fault = self._read(), ""
        except Exception as error:  # rocksdict raises bare Exceptions
            self.fault = str(error).partition("\n")[0]
            self.marks = StateMarks()
            self.close()
        return self.marks

    def _read(self) -> StateMarks:
        from streaming.rocks import database_path
        from streaming.store import Reader

        found = (database_path(self.state) / "IDENTITY").stat() if (database_path(self.state) / "IDENTITY").exists() else None
        identity = None if found is None else (found.st_ino, found.st_mtime_ns)
        if self._reader is not None and identity != self._identity:
            self.close()
        if self._reader is None:
            reader = Reader(self.state)
            self._reader, self._identity = reader, identity
            self._lateness = reader.semantics().stream.max_out_of_orderness_ms
        else:
            self._reader.refresh()
        progress = self._reader.progress()
        end = self.marks.session_end
        if progress.session_sequence != self.marks.sequence or end is None:
            last = progress.session_sequence
            end = next((session.end for _, session in self._reader.sessions(after=last - 1)), None) if last else None
        return StateMarks(
            newest=None if progress.watermark is None else progress.watermark + self._lateness,
            watermark=progress.watermark,
            session_end=end,
            sequence=progress.session_sequence,
            item_sequence=progress.item_sequence,
            counters=progress.counters,
        )

    @property
    def reader(self) -> Reader | None:
        """The reader as of the last look; None where there is no state."""
        return self._reader

    def recent_users(self) -> list[str]:
        """Users of the newest sessions, the newest first, each once."""
        if self._reader is None or not self.marks.sequence:
            return []
        found = [session.user_id for _, session in self._reader.sessions(after=max(0, self.marks.sequence - RECENT_SESSIONS))]
        return list(dict.fromkeys(reversed(found)))

    def event_times(self, after: int, until: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """(event time in ms, session's sequence) of every watched item of the sessions (after, until], and the stride.

        Of more than SAMPLE_SESSIONS sessions every stride-th is taken, counted from the newest.
        """
        if self._reader is None or until <= after:
            return np.empty(0, np.int64), np.empty(0, np.int64), 1
        stride = -(-(until - after) // SAMPLE_SESSIONS)
        times: list[int] = []
        sequences: list[int] = []

        def take(sequence: int, items: list[int]) -> None:
            times.extend(items)
            sequences.extend([sequence] * len(items))

        if stride == 1:
            for sequence, session in self._reader.sessions(after=after):
                if sequence > until:
                    break
                take(sequence, [item.ts for item in session.items])
        else:
            for wanted in range(until, after, -stride):
                for sequence, session in self._reader.sessions(after=wanted - 1):
                    if sequence == wanted:
                        take(sequence, [item.ts for item in session.items])
                    break
        return np.array(times, np.int64), np.array(sequences, np.int64), stride

    def item_times(self, after: int, until: int) -> NDArray[np.int64]:
        """Event times in ms of the catalogue entries (after, until]."""
        times: list[int] = []
        if self._reader is not None and until > after:
            for sequence, item in self._reader.items(after=after):
                if sequence > until:
                    break
                times.append(item.ts)
        return np.array(times, np.int64)

    def sequence_at(self, watermark: int) -> int:
        """The last session that ended at `watermark` or before; sessions are committed in order of their end."""
        low, high = 0, self.marks.sequence
        while self._reader is not None and low < high:
            middle = (low + high + 1) // 2
            end = next((session.end for _, session in self._reader.sessions(after=middle - 1)), None)
            if end is not None and end <= watermark:
                low = middle
            else:
                high = middle - 1
        return low

    def size(self) -> int | None:
        """Bytes of the database on the disk; None where there is none."""
        from streaming.rocks import database_path

        total, found = 0, False
        try:
            for entry in database_path(self.state).iterdir():
                try:
                    total += entry.stat().st_size
                    found = True
                except OSError:
                    continue  # RocksDB has just deleted it
        except OSError:
            return None
        return total if found else None

    def close(self) -> None:
        """Let go of the state."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


class CheckpointMarks(msgspec.Struct, frozen=True, kw_only=True):
    """The newest checkpoint of a run: its step, the event time learnt up to, when it was written; ms."""

    step: int | None = None
    watermark: int | None = None
    created_ms: int | None = None


class _Cached:
    """A look at a folder whose faults are kept in words."""

    fault = ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _try(self, question: Callable[[], T], nothing: T) -> T:
        try:
            found = question()
        except FAULTS as error:
            text = str(error).partition("\n")[0]
            self.fault = text if isinstance(error, OneRecError) else f"{self._folder}: {text}"
            return nothing
        self.fault = ""
        return found


class RunLook(_Cached):
    """The newest checkpoint of a run."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.run_dir = run_dir
        self.marks = CheckpointMarks()

    def look(self) -> CheckpointMarks:
        """The newest checkpoint as it is now; its tensors are not read."""
        self.marks = self._try(self._read, CheckpointMarks())
        return self.marks

    def _read(self) -> CheckpointMarks:
        from trainer.checkpoint import STATE_FILE, checkpoint_folder, checkpoint_steps

        steps = checkpoint_steps(self.run_dir)
        if not steps:
            return CheckpointMarks()
        if steps[-1] == self.marks.step:
            return self.marks
        record = msgspec.json.decode((checkpoint_folder(self.run_dir, steps[-1]) / STATE_FILE).read_bytes())
        return CheckpointMarks(step=steps[-1], watermark=record["watermark"], created_ms=record.get("created_ms"))


class RepositoryLook(_Cached):
    """Versions of a repository, by number; a manifest never changes, so each is read once."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.newest: Manifest | None = None
        self._manifests: dict[int, Manifest] = {}

    def look(self) -> Manifest | None:
        """The newest version's manifest."""
        self.newest = self._try(self._read, None)
        return self.newest

    def _read(self) -> Manifest | None:
        from exporter.repository import Repository

        versions = Repository(self.root).versions()
        for version in set(self._manifests) - set(versions):
            del self._manifests[version]
        return self._manifest(versions[-1]) if versions else None

    def _manifest(self, version: int) -> Manifest:
        from exporter.bundle import read_manifest
        from exporter.repository import Repository

        if version not in self._manifests:
            self._manifests[version] = read_manifest(Repository(self.root).folder(version))
        return self._manifests[version]

    def manifest(self, version: int) -> Manifest | None:
        """A version's manifest; None where it is gone or damaged."""
        return self._try(lambda: self._manifest(version), None)

    def published_ms(self, version: int) -> int | None:
        """Wall-clock time at which Triton had loaded a version and answered its publisher; None: not known."""
        from exporter.repository import Repository

        def find() -> int | None:
            events = reversed(Repository(self.root).events())
            told = (entry.at_ms for entry in events if entry.version == version and entry.event in ("published", "promoted"))
            return next(told, None)

        return self._try(find, None)

    def release(self) -> ReleaseStatus | None:
        """What is held back or on hold; None where it cannot be told."""
        from exporter.release import status

        return self._try(lambda: status(self.root), None) if self.root.is_dir() else None
