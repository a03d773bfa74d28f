"""What the page asks of the stream's state: how far it has come, its counts, refused lines, users and item names."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from streaming.changes import DeadLetter
from streaming.rocks import database_path
from streaming.store import Reader

NEWEST_LETTERS: Final = 5
LETTER_CHARACTERS: Final = 2_000
"""Of a refused line, which may be 1 MiB long."""
LETTERS_A_LOOK: Final = 20_000
RECENT_SESSIONS: Final = 400
HISTORY_SHOWN: Final = 100
SUGGESTIONS: Final = 10


class StateView:
    """A reader of one state, opened when there is one and anew when it was replaced; usable from several threads."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._reader: Reader | None = None
        self._identity: bytes | None = None
        self._forget_letters()

    def _forget_letters(self) -> None:
        self._letters_to = 0
        self._reasons: Counter[str] = Counter()
        self._newest: deque[tuple[int, DeadLetter]] = deque(maxlen=NEWEST_LETTERS)

    @contextmanager
    def _open(self) -> Iterator[Reader]:
        """The reader, caught up with the writer. Raises UserError or Failure where there is no state to read."""
        with self._lock:
            identity = _identity(self._state)
            if self._reader is not None and identity != self._identity:
                self._close()
            try:
                if self._reader is None:
                    self._reader, self._identity = Reader(self._state), identity
                else:
                    self._reader.refresh()
                yield self._reader
            except Exception:
                # Whatever was wrong, the next look begins with a fresh instance.
                self._close()
                raise

    def _close(self) -> None:
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.close()
        self._forget_letters()

    def close(self) -> None:
        """Lets go of the state."""
        with self._lock:
            self._close()

    def progress(self) -> dict[str, Any]:
        """Marks in epoch ms, counts over the whole log, and refused lines by reason with the newest few."""
        with self._open() as reader:
            progress = reader.progress()
            last = progress.session_sequence
            newest = next((session.end for _, session in reader.sessions(after=last - 1)), None) if last else None
            event = None
            if progress.watermark is not None:
                event = progress.watermark + reader.semantics().stream.max_out_of_orderness_ms
            return {
                "marks": {"event": event, "history": progress.watermark, "session": newest},
                "counters": msgspec.to_builtins(progress.counters),
                "items": progress.item_sequence,
                "session_sequence": last,
                "dead_letters": self._dead_letters(reader, progress.counters.dead_letters),
            }

    def _dead_letters(self, reader: Reader, stored: int) -> dict[str, Any]:
        """Counts by reason. Letters that were mended leave the store, so then it is counted anew."""
        if sum(self._reasons.values()) > stored:
            self._forget_letters()
        for number, letter in islice(reader.dead_letters(self._letters_to), LETTERS_A_LOOK):
            self._letters_to = number
            self._reasons[letter.reason] += 1
            self._newest.append((number, letter))
        return {
            "by_reason": dict(self._reasons.most_common()),
            "newest": [_letter(number, letter) for number, letter in reversed(self._newest)],
        }

    def user(self, user_id: str) -> dict[str, Any]:
        """A user's history, newest first, with what is known of the items; `known` False for a user never seen."""
        with self._open() as reader:
            history = reader.history(user_id)
            shown = (history or [])[::-1][:HISTORY_SHOWN]
            return {
                "known": history is not None,
                "length": len(history or []),
                "history": self._named(reader, shown),
            }

    def items(self, item_ids: list[str]) -> list[dict[str, Any]]:
        """What is known of items; an item without a catalogue entry has its id alone."""
        with self._open() as reader:
            return self._named(reader, item_ids)

    @staticmethod
    def _named(reader: Reader, item_ids: list[str]) -> list[dict[str, Any]]:
        found = []
        for item_id in item_ids:
            entry: dict[str, Any] = {"item_id": item_id}
            record = reader.item(item_id)
            if record is not None:
                entry |= {"tags": record.tags, "author_id": record.author_id, "duration_ms": record.duration_ms}
            found.append(entry)
        return found

    def recent_users(self) -> list[str]:
        """Users of the newest sessions, newest first, each once."""
        with self._open() as reader:
            sessions = reader.sessions(after=max(0, reader.last_sequence() - RECENT_SESSIONS))
            users = [session.user_id for _, session in islice(sessions, 2 * RECENT_SESSIONS)]
        return list(dict.fromkeys(reversed(users)))

    def suggestions(self, prefix: str) -> list[str]:
        """User ids that begin with `prefix`; without one, those of the newest sessions."""
        if not prefix:
            return self.recent_users()[:SUGGESTIONS]
        with self._open() as reader:
            return [user_id for user_id, _ in islice(reader.users(prefix), SUGGESTIONS)]


def _identity(state: Path) -> bytes | None:
    """RocksDB's name for the database: another one means that the state was made anew."""
    try:
        return (database_path(state) / "IDENTITY").read_bytes()
    except OSError:
        return None


def _letter(number: int, letter: DeadLetter) -> dict[str, Any]:
    text = letter.raw[: 4 * LETTER_CHARACTERS].decode(errors="replace")
    return {
        "number": number,
        "source": str(letter.position),
        "reason": letter.reason,
        "line": text[:LETTER_CHARACTERS],
        "bytes": len(letter.raw),
        "cut": len(text) > LETTER_CHARACTERS or len(letter.raw) > 4 * LETTER_CHARACTERS,
    }
