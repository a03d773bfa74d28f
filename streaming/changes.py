"""What a batch changes, for a store to write in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from streaming.items import ItemRecord
from streaming.sessions import Session


class Counters(msgspec.Struct):
    """Counts over the whole log (§9); `events` are valid ones, duplicates and late ones included."""

    events: int = 0
    duplicates: int = 0
    late: int = 0
    dead_letters: int = 0
    users: int = 0
    sessions: int = 0
    high_quality: int = 0

    def since(self, before: Counters) -> Counters:
        """What was added."""
        return Counters(**{name: getattr(self, name) - getattr(before, name) for name in self.__struct_fields__})


class DeadLetter(msgspec.Struct, frozen=True, array_like=True):
    """A refused line: where it stood in its source, its bytes, and the code of the reason."""

    position: Any
    raw: bytes
    reason: str

    def __iter__(self) -> Iterator[Any]:
        """Unpacks as (position, raw, reason)."""
        return iter((self.position, self.raw, self.reason))


class Changes(msgspec.Struct):
    """What a batch changed: values per user, sessions in commit order, refusals, catalogue entries in order of arrival.

    A user's value is (live, base): live None means that no live event is left, base None that the base is as before.
    `late_used` counts late events that went into a history all the same; `open_users` are those who then have a session that
    is not final.
    """

    users: dict[str, tuple[bytes | None, bytes | None]]
    sessions: list[Session]
    dead_letters: list[DeadLetter]
    items: list[ItemRecord]
    late_used: int = 0
    open_users: int = 0
