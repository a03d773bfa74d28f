"""What has to be closed, as a context manager."""

from __future__ import annotations

import types
from typing import Self


class Closing:
    """Leaving the block calls `close`, whatever happened."""

    def close(self) -> None:
        """Lets go of what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()
