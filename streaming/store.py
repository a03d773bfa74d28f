"""RocksDB below the stream: one atomic commit of state, sessions, counters and source positions; readers beside a live writer.

Column families (raw mode, versioned values): `users` ("b" + user id: compacted history; "l" + user id: live events), `sessions`
(commit sequence, 8 bytes big-endian), `items` ("i" + item id: sequence and entry; "s" + sequence: item id), `meta` (format,
settings, progress, "p" + source: position, "d" + sequence: dead letter).
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from rocksdict import AccessType, Rdict, WriteBatch

from onerec.closing import Closing
from onerec.errors import Failure, OneRecError, UserError
from streaming.changes import Changes, Counters, DeadLetter
from streaming.core import Core
from streaming.items import ItemRecord, decode_item, encode_item
from streaming.rocks import WORKER, database_options, database_path, open_error, write_error
from streaming.semantics import Semantics
from streaming.sessions import Session, decode_session, encode_session
from streaming.state import NEVER, decode_due, history_of, is_seen

FORMAT: Final = 1
FEED: Final = "feed"
REPLICA: Final = "replica"
"""Sources whose states are copies of what Kafka holds."""
FAMILIES: Final = ("users", "sessions", "items", "meta")
REOPEN_TRIES: Final = 5
"""Each fails only where the writer merges files in the milliseconds between reading their list and opening them."""
_SEQUENCE = struct.Struct(">Q")
_PROGRESS: Final = b"progress"


class Progress(msgspec.Struct):
    """What the log has come to: one value, written with every batch."""

    counters: Counters
    watermark: int | None = None
    session_sequence: int = 0
    item_sequence: int = 0
    dead_sequence: int = 0
    dimension: int | None = None


class _Database:
    """Handles of the column families; `close` releases every one, without which RocksDB keeps its lock."""

    def __init__(self, path: Path, access: AccessType, *, secondary: bool) -> None:
        options = database_options(secondary)
        self.db = Rdict(str(path), options, {name: options for name in FAMILIES}, access)
        self.users, self.sessions, self.items, self.meta = (self.db.get_column_family(name) for name in FAMILIES)

    def close(self) -> None:
        for name in FAMILIES:
            if hasattr(self, name):
                delattr(self, name)
        self.db.close()


def _scan(family: Rdict, prefix: bytes, start: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
    """Pairs whose key begins with `prefix`, from key `start` on, the prefix cut off."""
    pairs: Iterator[tuple[Any, Any]] = family.items(from_key=start or prefix)
    for key, value in pairs:
        if not key.startswith(prefix):
            return
        yield key[len(prefix) :], value


def _check_format(meta: Rdict, state: Path) -> None:
    found = meta.get(b"format")
    if found is None:
        raise UserError(f"state {state}: {database_path(state)} is not a state of onerec; give --state another folder")
    if found.startswith(WORKER):
        raise UserError(
            f"state {state} is that of a stream worker, which others cannot read; `onerec histories-replica` keeps histories "
            "to read, `onerec feed` sessions"
        )
    if int(found) != FORMAT:
        raise UserError(
            f"state {state} has format {int(found)}, this version reads {FORMAT}; replay the log into a new folder"
        )


def _read_progress(meta: Rdict) -> Progress:
    value = meta.get(_PROGRESS)
    return Progress(Counters()) if value is None else msgspec.json.decode(value, type=Progress)


class _Shared(Closing):
    """Reading methods that writer and secondary reader have in common."""

    state: Path
    _database: _Database

    def close(self) -> None:
        """Releases the database and every handle on it."""
        self._database.close()

    def progress(self) -> Progress:
        """Counters, watermark and sequences as last committed."""
        return _read_progress(self._database.meta)

    def counters(self) -> Counters:
        """Counts over the whole log (SEMANTICS.md §9)."""
        return self.progress().counters

    def watermark(self) -> int | None:
        """Newest event time known complete, ms; None before the first valid event."""
        return self.progress().watermark

    def semantics(self) -> Semantics:
        """The values that the state was built with."""
        value = self._database.meta.get(b"semantics")
        if value is None:
            raise UserError(f"state {self.state} has no settings; it is damaged: replay the log into a new folder")
        return msgspec.json.decode(value, type=Semantics)

    def positions(self) -> dict[str, dict[str, Any]]:
        """How far every source has been applied, as last given to `commit` or `append`, by source name."""
        pairs = ((name.decode(), value) for name, value in _scan(self._database.meta, b"p") if name != _PROGRESS[1:])
        return {name: msgspec.json.decode(value) for name, value in pairs}

    def last_sequence(self) -> int:
        """Sequence of the newest committed session, 0 if none."""
        return self.progress().session_sequence

    def sessions(self, after: int = 0) -> Iterator[tuple[int, Session]]:
        """(sequence, session) in commit order, from the first sequence greater than `after`."""
        pairs: Iterator[tuple[Any, Any]] = self._database.sessions.items(from_key=_SEQUENCE.pack(after + 1))
        for key, value in pairs:
            yield _SEQUENCE.unpack(key)[0], decode_session(value)

    def history(self, user_id: str) -> list[str] | None:
        """H(∞), oldest first; None for a user without a valid event (§4)."""
        name = user_id.encode()
        base = self._database.users.get(b"b" + name)
        if base is None or not is_seen(base):
            return None
        return history_of(self._database.users.get(b"l" + name), base, self._length())

    def users(self, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
        """(user id, H(∞)) of every user with a valid event whose id begins with `prefix`, in byte order of the id."""
        n = self._length()
        users = self._database.users
        begins = prefix.encode()
        for rest, base in _scan(users, b"b" + begins):
            if is_seen(base):
                name = begins + rest
                yield name.decode(), history_of(users.get(b"l" + name), base, n)

    def item(self, item_id: str) -> ItemRecord | None:
        """The newest catalogue entry of an item, None where there is none."""
        value = self._database.items.get(b"i" + item_id.encode())
        return None if value is None else decode_item(value[8:])

    def items(self, after: int = 0) -> Iterator[tuple[int, ItemRecord]]:
        """(sequence, entry) of the catalogue in order of arrival; an entry sent again has only its newest place."""
        family = self._database.items
        for key, item_id in _scan(family, b"s", b"s" + _SEQUENCE.pack(after + 1)):
            value = family.get(b"i" + item_id)
            if value is not None and value[:8] == key:
                yield _SEQUENCE.unpack(key)[0], decode_item(value[8:])

    def dead_letters(self, after: int = 0) -> Iterator[tuple[int, DeadLetter]]:
        """(number, dead letter) in order of refusal."""
        for key, value in _scan(self._database.meta, b"d", b"d" + _SEQUENCE.pack(after + 1)):
            yield _SEQUENCE.unpack(key)[0], msgspec.msgpack.decode(value[1:], type=DeadLetter)

    def _length(self) -> int:
        if not hasattr(self, "_history_length"):
            self._history_length = self.semantics().history.length
        return self._history_length


class Store(_Shared):
    """The one writer of a state directory.

    Raises UserError where the folder is foreign, of another format, built with other semantic values, or already written to
    by another process; Failure where the disk refuses a write (nothing of that batch is then stored).
    """

    def __init__(self, state: Path | str, semantics: Semantics) -> None:
        self.state = Path(state)
        path = database_path(self.state)
        fresh = not path.exists()
        if fresh and self.state.is_dir() and any(name not in ("db", "catalogue") for name in os.listdir(self.state)):
            raise UserError(f"state {self.state} holds other files and no state of onerec; give --state another folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"state {self.state}: {error.strerror}; give --state a writable folder") from None
        if not fresh and any(path.iterdir()) and not (path / "CURRENT").exists():
            raise UserError(f"state {self.state}: {path} is not a state of onerec; give --state another folder")
        try:
            self._database = _Database(path, AccessType.read_write(), secondary=False)
        except Exception as error:
            raise open_error(self.state, error) from None
        try:
            self._begin(semantics)
        except OneRecError:
            self._database.close()
            raise
        self._progress = self.progress()

    def _begin(self, semantics: Semantics) -> None:
        meta = self._database.meta
        if meta.get(b"format") is None:
            if next(iter(meta.keys()), None) is not None:
                _check_format(meta, self.state)
            batch = WriteBatch(raw_mode=True)
            handle = self._database.db.get_column_family_handle("meta")
            batch.put(b"format", str(FORMAT).encode(), handle)
            batch.put(b"semantics", msgspec.json.encode(semantics), handle)
            self._write(batch)
            return
        _check_format(meta, self.state)
        stored = self.semantics()
        if stored != semantics:
            raise UserError(f"state {self.state} was built with other settings: {difference(stored, semantics)}; "
                            "use those, or replay into another folder")

    def core(self, **options: Any) -> Core:
        """The stream's core, going on from what is stored. Raises UserError for a state that others than replay write."""
        for source, command in ((FEED, "feed"), (REPLICA, "histories-replica")):
            if self.position(source) is not None:
                raise UserError(
                    f"state {self.state} is what `onerec {command}` copies from Kafka; another log does not belong there: give "
                    "--state a folder of its own"
                )
        # Through self, so that `close` can let go of the last handle and with it of the lock.
        def load(user_id: str) -> tuple[bytes | None, bytes | None] | None:
            users = self._database.users
            name = user_id.encode()
            base = users.get(b"b" + name)
            return None if base is None else (users.get(b"l" + name), base)

        due = ((decode_due(value), name.decode()) for name, value in _scan(self._database.users, b"l"))
        return Core(
            self.semantics(),
            load,
            counters=self._progress.counters,
            watermark=self._progress.watermark,
            dimension=self._progress.dimension,
            due=[entry for entry in due if entry[0] != NEVER],
            **options,
        )

    def position(self, source: str) -> dict[str, Any] | None:
        """How far a source has been applied, as last given to `commit`."""
        value = self._database.meta.get(b"p" + source.encode())
        return None if value is None else msgspec.json.decode(value)

    def commit(
        self, core: Core, changes: Changes, positions: dict[str, dict[str, Any]], mended: Iterable[int] = ()
    ) -> None:
        """Writes all that a batch changed, with counters and source positions, in one WriteBatch.

        `mended` are numbers of dead letters whose events are among the changes: they leave the store in the same write.
        """
        database = self._database
        handle = database.db.get_column_family_handle
        users, sessions, meta = handle("users"), handle("sessions"), handle("meta")
        batch = WriteBatch(raw_mode=True)
        put = batch.put
        for user_id, (live, base) in changes.users.items():
            name = user_id.encode()
            if live is None:
                batch.delete(b"l" + name, users)
            else:
                put(b"l" + name, live, users)
            if base is not None:
                put(b"b" + name, base, users)
        progress = msgspec.structs.replace(self._progress)
        for session in changes.sessions:
            progress.session_sequence += 1
            put(_SEQUENCE.pack(progress.session_sequence), encode_session(session), sessions)
        for letter in changes.dead_letters:
            progress.dead_sequence += 1
            put(b"d" + _SEQUENCE.pack(progress.dead_sequence), b"\x01" + msgspec.msgpack.encode(letter), meta)
        for number in mended:
            batch.delete(b"d" + _SEQUENCE.pack(number), meta)
        self._put_items(batch, changes.items, progress)
        progress.counters = core.counters
        progress.watermark = core.watermark
        progress.dimension = core.dimension
        self._finish(batch, progress, positions)

    def append(
        self,
        sessions: Iterable[Session],
        positions: dict[str, dict[str, Any]],
        *,
        watermark: int | None,
        items: list[ItemRecord] | None = None,
    ) -> None:
        """Writes sessions made elsewhere, with catalogue entries and source positions, in one WriteBatch.

        The counters tell of sessions alone; `watermark` is the event time that the session log is now complete to.
        """
        batch = WriteBatch(raw_mode=True)
        handle = self._database.db.get_column_family_handle
        progress = msgspec.structs.replace(self._progress, watermark=watermark)
        progress.counters = msgspec.structs.replace(progress.counters)
        family = handle("sessions")
        for session in sessions:
            progress.session_sequence += 1
            progress.counters.sessions += 1
            progress.counters.high_quality += session.high_quality
            batch.put(_SEQUENCE.pack(progress.session_sequence), encode_session(session), family)
        for item in items or []:
            if item.embedding is not None and progress.dimension is None:
                progress.dimension = len(item.embedding)
        self._put_items(batch, items or [], progress)
        self._finish(batch, progress, positions)

    def put_histories(
        self,
        pairs: Iterable[tuple[bytes, bytes | None]],
        positions: dict[str, dict[str, Any]],
        *,
        watermark: int | None,
        counters: Counters,
    ) -> None:
        """Writes pairs of column family `users` made elsewhere (None deletes), with source positions, in one WriteBatch."""
        batch = WriteBatch(raw_mode=True)
        family = self._database.db.get_column_family_handle("users")
        for key, value in pairs:
            if value is None:
                batch.delete(key, family)
            else:
                batch.put(key, value, family)
        self._finish(batch, msgspec.structs.replace(self._progress, watermark=watermark, counters=counters), positions)

    def _finish(self, batch: WriteBatch, progress: Progress, positions: dict[str, dict[str, Any]]) -> None:
        """Puts progress and positions into the batch and writes it."""
        meta = self._database.db.get_column_family_handle("meta")
        for source, position in positions.items():
            batch.put(b"p" + source.encode(), msgspec.json.encode(position), meta)
        batch.put(_PROGRESS, msgspec.json.encode(progress), meta)
        self._write(batch)
        self._progress = progress

    def put_items(self, items: list[ItemRecord]) -> int:
        """Puts catalogue entries; those stored as they are keep their place. Returns how many were new or changed."""
        progress = msgspec.structs.replace(self._progress)
        batch = WriteBatch(raw_mode=True)
        for item in items:
            if item.embedding is not None and progress.dimension is None:
                progress.dimension = len(item.embedding)
        changed = self._put_items(batch, items, progress)
        self._finish(batch, progress, {})
        return changed

    def _put_items(self, batch: WriteBatch, items: list[ItemRecord], progress: Progress) -> int:
        if not items:
            return 0
        handle = self._database.db.get_column_family_handle("items")
        family = self._database.items
        newest = {item.item_id: item for item in items}
        changed = 0
        for item_id, item in newest.items():
            name, value = item_id.encode(), encode_item(item)
            stored = family.get(b"i" + name)
            if stored is not None:
                if stored[8:] == value:
                    continue
                batch.delete(b"s" + stored[:8], handle)
            progress.item_sequence += 1
            changed += 1
            sequence = _SEQUENCE.pack(progress.item_sequence)
            batch.put(b"i" + name, sequence + value, handle)
            batch.put(b"s" + sequence, name, handle)
        return changed

    def sync(self) -> None:
        """Makes all commits so far safe against a crash of the machine, not only of the process."""
        try:
            self._database.db.flush_wal(True)
        except Exception as error:
            raise write_error(self.state, error) from None

    def _write(self, batch: WriteBatch) -> None:
        try:
            self._database.db.write(batch)
        except Exception as error:
            raise write_error(self.state, error) from None


class Reader(_Shared):
    """A secondary instance: sees the writer's commits after `refresh`, never disturbs it, needs no lock.

    Raises UserError where the folder holds no state, or one of another format.
    """

    def __init__(self, state: Path | str) -> None:
        self.state = Path(state)
        path = database_path(self.state)
        if not (path / "CURRENT").exists():
            raise UserError(f"state {self.state}: there is none; `onerec replay FILE --state {self.state}` makes it")
        self._own = ""
        self._manifest = _manifest(path)
        try:
            self._database, self._own = _open_secondary(path)
        except Exception as error:
            if "Column family" in str(error) or "Invalid argument" in str(error):
                raise UserError(f"state {self.state}: {path} is not a state of onerec") from None
            raise Failure(f"state {self.state} cannot be read: {error}") from None
        try:
            self.refresh()
            _check_format(self._database.meta, self.state)
        except BaseException:
            self.close()
            raise

    def refresh(self) -> None:
        """Catches up with the writer's commits (about 2 ms; 10 ms and more where the writer has flushed since).

        What was being read from `sessions`, `items` and the like goes on as of before.
        """
        path = database_path(self.state)
        if _manifest(path) == self._manifest:
            self._database.db.try_catch_up_with_primary()
            if _manifest(path) == self._manifest:
                return
        # What a RocksDB secondary has replayed from the log hides newer values of the same keys that were flushed since.
        self._reopen(path)

    def _reopen(self, path: Path) -> None:
        for _ in range(REOPEN_TRIES):
            before = _manifest(path)
            try:
                database, own = _open_secondary(path)
            except Exception:  # noqa: S112 - the writer deletes what it has merged: look again
                continue
            old, self._database = self._database, database
            gone, self._own = self._own, own
            self._manifest = before
            old.close()
            shutil.rmtree(gone, ignore_errors=True)
            if _manifest(path) == before:
                return
        self._database.db.try_catch_up_with_primary()

    def close(self) -> None:
        """Releases the instance and its own log folder."""
        super().close()
        shutil.rmtree(self._own, ignore_errors=True)


def _open_secondary(path: Path) -> tuple[_Database, str]:
    """A secondary instance as of now, and the folder of its own that it writes its log to."""
    own = tempfile.mkdtemp(prefix="onerec-reader-")
    try:
        return _Database(path, AccessType.secondary(own), secondary=True), own
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        raise


def _manifest(path: Path) -> tuple[bytes, int]:
    """Which list of files the writer keeps, and its length: it grows with every flush. Empty while it is being replaced."""
    try:
        current = (path / "CURRENT").read_bytes()
        return current, (path / current.decode().strip()).stat().st_size
    except (OSError, UnicodeDecodeError):
        return b"", 0


def difference(stored: Semantics, asked: Semantics) -> str:
    """The keys whose values differ, as the state has them."""
    parts = []
    for section in msgspec.structs.fields(Semantics):
        mine, theirs = getattr(stored, section.name), getattr(asked, section.name)
        for key in msgspec.structs.fields(type(mine)):
            has, want = getattr(mine, key.name), getattr(theirs, key.name)
            if has != want:
                parts.append(f"{section.name}.{key.name} is {has}, asked {want}")
    return "; ".join(parts)
