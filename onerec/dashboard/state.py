"""What the page asks of the stream's state: how far it has come, its counts, refused lines, users and item names."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from onerec.errors import Failure
from onerec.monitor.looks import StateLook
from streaming.changes import DeadLetter
from streaming.store import Reader

NEWEST_LETTERS: Final = 5
LETTER_CHARACTERS: Final = 2_000
"""Of a refused line, which may be 1 MiB long."""
LETTERS_A_LOOK: Final = 20_000
HISTORY_SHOWN: Final = 100
SUGGESTIONS: Final = 10


class StateView:
    """One state, and titles of items by id; usable from several threads."""

    def __init__(self, state: Path, titles: Mapping[str, str]) -> None:
        self._titles = titles
        self._look = StateLook(state)
        self._lock = threading.Lock()
        self._forget_letters(None)

    def _forget_letters(self, reader: Reader | None) -> None:
        self._letters_of = reader
        self._letters_to = 0
        self._reasons: Counter[str] = Counter()
        self._newest: deque[tuple[int, DeadLetter]] = deque(maxlen=NEWEST_LETTERS)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """The reader, caught up with the writer. Raises Failure where there is no state to read."""
        with self._lock:
            self._look.look()
            reader = self._look.reader
            if reader is None:
                raise Failure(self._look.fault)
            try:
                yield reader
            except Exception:
                # Whatever was wrong, the next look begins with a fresh instance.
                self._look.close()
                raise

    def close(self) -> None:
        """Lets go of the state."""
        with self._lock:
            self._look.close()

    def progress(self) -> dict[str, Any]:
        """Marks in epoch ms, counts over the whole log, and refused lines by reason with the newest few."""
        with self.open() as reader:
            marks = self._look.marks
            assert marks.counters is not None
            return {
                "marks": {"event": marks.newest, "history": marks.watermark, "session": marks.session_end},
                "counters": msgspec.to_builtins(marks.counters),
                "items": marks.item_sequence,
                "session_sequence": marks.sequence,
                "dead_letters": self._dead_letters(reader, marks.counters.dead_letters),
            }

    def _dead_letters(self, reader: Reader, stored: int) -> dict[str, Any]:
        """Counts by reason. Letters that were mended leave the store, so then it is counted anew."""
        if reader is not self._letters_of or self._reasons.total() > stored:
            self._forget_letters(reader)
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
        with self.open() as reader:
            history = reader.history(user_id)
            shown = (history or [])[::-1][:HISTORY_SHOWN]
            return {
                "known": history is not None,
                "length": len(history or []),
                "history": self._named(reader, shown),
            }

    def items(self, item_ids: list[str]) -> list[dict[str, Any]]:
        """What is known of items; an item without a catalogue entry has its id alone."""
        with self.open() as reader:
            return self._named(reader, item_ids)

    def _named(self, reader: Reader, item_ids: list[str]) -> list[dict[str, Any]]:
        found = []
        for item_id in item_ids:
            entry: dict[str, Any] = {"item_id": item_id, "title": self._titles.get(item_id)}
            record = reader.item(item_id)
            if record is not None:
                entry |= {"tags": record.tags, "author_id": record.author_id, "duration_ms": record.duration_ms}
            found.append(entry)
        return found

    def recent_users(self) -> list[str]:
        """Users of the newest sessions, newest first, each once."""
        with self.open():
            return self._look.recent_users()

    def suggestions(self, prefix: str) -> list[str]:
        """User ids that begin with `prefix`; without one, those of the newest sessions."""
        if not prefix:
            return self.recent_users()[:SUGGESTIONS]
        with self.open() as reader:
            return [user_id for user_id, _ in islice(reader.users(prefix), SUGGESTIONS)]


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
