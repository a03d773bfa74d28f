"""A worker's RocksDB: the state of many partitions in one database, each with the place that its changelog was read to.

Column family `users`: partition (2 bytes) + "b" or "l" + user id; `meta`: "format", and "c" + partition → `Place`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from rocksdict import AccessType, Rdict, WriteBatch

from onerec.errors import Failure, UserError
from streaming.kafka.wire import Progress
from streaming.rocks import WORKER, database_options, database_path, open_error, write_error
from streaming.state import NEVER, decode_due

FORMAT: Final = WORKER + b"1"
FAMILIES: Final = ("users", "sessions", "items", "meta")
"""Those of every state, so that a reader finds the format and can say what this is."""
_PARTITION = struct.Struct(">H")


class Place(msgspec.Struct, kw_only=True):
    """What the local copy of a partition holds: the changelog below `changelog`, which brought it to `progress`.

    `topic_id` tells the changelog from another of its name.
    """

    topic_id: str
    changelog: int = 0
    progress: Progress


class Local:
    """The one writer of a worker's database. Raises UserError or Failure as `Store` does."""

    def __init__(self, state: Path) -> None:
        self.state = state
        path = database_path(state)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"state {state}: {error.strerror}; give --state a writable folder") from None
        options = database_options()
        try:
            self._db = Rdict(str(path), options, {name: options for name in FAMILIES}, AccessType.read_write())
        except Exception as error:
            raise open_error(state, error) from None
        self._users, self._meta = (self._db.get_column_family(name) for name in ("users", "meta"))
        found = self._meta.get(b"format")
        if found is None and next(iter(self._meta.keys()), None) is None:
            self._meta[b"format"] = FORMAT
        elif found != FORMAT:
            self.close()
            raise UserError(
                f"state {state} is not that of a stream worker of this version; give --state another folder, or empty it: "
                "a worker's state is rebuilt from the topic `histories`"
            )

    def close(self) -> None:
        """Releases every handle, without which RocksDB keeps its lock."""
        for name in ("_users", "_meta"):
            if hasattr(self, name):
                delattr(self, name)
        self._db.close()

    def place(self, partition: int) -> Place | None:
        """What is here of a partition; None: nothing."""
        value = self._meta.get(b"c" + _PARTITION.pack(partition))
        if value is None:
            return None
        try:
            return msgspec.json.decode(value, type=Place)
        except msgspec.MsgspecError as error:
            raise Failure(f"state {self.state}: partition {partition} is damaged ({error}); empty the folder") from None

    def write(self, partition: int, pairs: Iterable[tuple[bytes, bytes | None]], place: Place) -> None:
        """Puts pairs of `users` (None deletes) and the place, in one WriteBatch."""
        batch = WriteBatch(raw_mode=True)
        users = self._db.get_column_family_handle("users")
        prefix = _PARTITION.pack(partition)
        put = batch.put
        for key, value in pairs:
            if value is None:
                batch.delete(prefix + key, users)
            else:
                put(prefix + key, value, users)
        put(b"c" + prefix, msgspec.json.encode(place), self._db.get_column_family_handle("meta"))
        try:
            self._db.write(batch)
        except Exception as error:
            raise write_error(self.state, error) from None

    def load(self, partition: int, user_id: str) -> tuple[bytes | None, bytes | None] | None:
        """Stored (live, base) of a user; None for one never seen."""
        prefix, name = _PARTITION.pack(partition), user_id.encode()
        base = self._users.get(prefix + b"b" + name)
        return None if base is None else (self._users.get(prefix + b"l" + name), base)

    def due(self, partition: int) -> Iterator[tuple[int, str]]:
        """(due time, user id) of the users with open sessions."""
        prefix = _PARTITION.pack(partition) + b"l"
        pairs: Iterator[tuple[Any, Any]] = self._users.items(from_key=prefix)
        for key, value in pairs:
            if not key.startswith(prefix):
                return
            due = decode_due(value)
            if due != NEVER:
                yield due, key[len(prefix) :].decode()

    def wipe(self, partition: int) -> None:
        """Forgets a partition."""
        prefix = _PARTITION.pack(partition)
        batch = WriteBatch(raw_mode=True)
        users = self._db.get_column_family_handle("users")
        batch.delete(b"c" + prefix, self._db.get_column_family_handle("meta"))
        batch.delete_range(prefix, _PARTITION.pack(partition + 1), users)
        self._db.write(batch)
