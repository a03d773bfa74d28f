"""Reading on in files that grow a line at a time, and noticing when one was cut back or replaced."""

from __future__ import annotations

from pathlib import Path

BLOCK = 8 << 20
"""Bytes read at a look at most: a run of weeks is read in several."""
REMEMBERED = 64


class Tail:
    """The complete lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._last = b""

    def read(self) -> tuple[bool, list[bytes]]:
        """(begun anew, new lines). The first is True where the file is not what was read before: forget all of it.

        A file that is not there has no lines. A resumed trainer cuts its file back, which the bytes before the place
        where we stand betray even if it has grown past it since.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                anew = file.read(len(self._last)) != self._last
                if anew:
                    self._offset, self._last = 0, b""
                    file.seek(0)
                block = file.read(BLOCK)
        except FileNotFoundError:
            anew, self._offset, self._last = self._offset > 0, 0, b""
            return anew, []
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._last = (self._last + whole)[-REMEMBERED:]
        return anew, whole.splitlines()
