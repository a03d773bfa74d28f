"""Files of a run that grow with its steps, and are cut back to what the checkpoint knows when the run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from onerec.errors import Failure


class RunFile:
    """A file for appending, first cut to `size` bytes: what is learnt again is written again.

    Raises Failure where the disk refuses; `say` is told where the file is shorter than `size`.
    """

    def __init__(self, path: Path, size: int, say: Callable[[str], None]) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if self.size < size:
                say(f"{path} lost what the checkpoint knows of it; the curves have a gap there")
            os.ftruncate(self._file, min(size, self.size))
        except OSError as error:
            raise Failure(f"{path} cannot be opened: {error.strerror}; mend permissions or disk") from error

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return os.fstat(self._file).st_size

    def append(self, content: bytes) -> None:
        """Write at the end."""
        try:
            os.write(self._file, content)
        except OSError as error:
            raise Failure(f"{self.path} cannot be written: {error.strerror}; free space and start again") from error

    def sync(self) -> None:
        """Force to the disk what was written."""
        os.fsync(self._file)

    def close(self) -> None:
        """Release the file."""
        os.close(self._file)
