"""The run's journal: what a batch owes to the clock and not to the log, kept so that a replay does the same."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from onerec.errors import Failure, UserError


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What batch `step` did that the log alone does not tell.

    `end`: it closed after this sequence before it was full (an idle log, or its end). `items`: from the sessions after
    sequence `begin` on (default: from the batch's first), that many rows of the catalogue are known. `pairs`: numbers of
    the records of the pair log that its step learnt; `taken`: the last record that it took, the passed-over ones too.
    """

    step: int
    end: int | None = None
    items: int | None = None
    begin: int = 0
    pairs: tuple[int, ...] = ()
    taken: int = 0


def _together(first: Entry | None, second: Entry) -> Entry:
    """What two lines say of one step: where the second is silent, the first holds."""
    if first is None:
        return second
    default = Entry(step=second.step)
    said = {
        name: getattr(second, name)
        for name in second.__struct_fields__
        if getattr(second, name) != getattr(default, name)
    }
    return msgspec.structs.replace(first, **said)


class Journal:
    """RUN/journal.jsonl: read once, then appended to; an entry is on the disk before its batch is learnt.

    A step may have two lines: where its batch ended, and which preference pairs it took.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[int, Entry] = {}
        self._file = -1
        self.last_at_start = 0
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:whole].splitlines(), 1):
                try:
                    entry = msgspec.json.decode(line, type=Entry)
                except msgspec.DecodeError as error:
                    raise UserError(f"{path} line {number} is damaged ({error}); start a new --run") from None
                self._entries[entry.step] = _together(self._entries.get(entry.step), entry)
            self.last_at_start = max(self._entries, default=0)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            # A line cut by a kill was never acted upon.
            os.ftruncate(self._file, whole)
        except OSError as error:
            raise Failure(f"{path} cannot be opened: {error.strerror}; mend permissions or disk") from error

    def replays(self, step: int) -> bool:
        """Whether step `step` may have been taken in an earlier life: then the journal alone says what it took."""
        return step <= self.last_at_start

    def entry(self, step: int) -> Entry | None:
        """What is written of batch `step`."""
        return self._entries.get(step)

    def covers(self, step: int) -> bool:
        """Whether batch `step` was closed in an earlier life: then the journal decides it, also by its silence."""
        return bool(self._entries) and step <= max(self._entries)

    def append(self, entry: Entry) -> None:
        """Write an entry and force it to the disk; raises Failure when the disk refuses."""
        try:
            os.write(self._file, msgspec.json.encode(entry) + b"\n")
            os.fsync(self._file)
        except OSError as error:
            raise Failure(f"{self.path} cannot be written: {error.strerror}; free space and start again") from error
        self._entries[entry.step] = _together(self._entries.get(entry.step), entry)

    def close(self) -> None:
        """Release the file."""
        os.close(self._file)
