"""Byte streams of files and standard input: plain, gzip or zstd; damage is told, not swallowed."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import sys
import zlib
from collections.abc import Callable
from typing import IO, Any, Final

import zstandard

from onerec.errors import Failure, UserError

HEAD_BYTES: Final = 64 << 10


class _ZstdReader:
    """zstd frames one after another. The library's own stream reader ends silently where the last frame is cut off."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fed = False
        self._ready = b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end; EOFError where a frame is cut off."""
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._fed = zstandard.ZstdDecompressor().decompressobj(), False
            data = data or self._raw.read1(1 << 20)  # type: ignore[attr-defined]
            if not data:
                if self._fed:
                    raise EOFError
                return b""
            self._fed = True
            self._ready = self._frame.decompress(data)
        part, self._ready = self._ready[:size], self._ready[size:]
        return part


class Tracked(io.RawIOBase):
    """A byte stream that knows how much was read of it, keeps a hash of its beginning, and names itself in errors."""

    def __init__(self, name: str, inner: Any, raw: IO[bytes], size: int | None) -> None:
        self.name = name
        self.size = size
        self._inner = inner
        self._raw = raw
        self._head = bytearray()
        self._ahead = b""
        self.consumed = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what is there, up to the buffer's length."""
        data = self.read_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read_some(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end. Raises UserError where the file is damaged or truncated."""
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
        else:
            data = self._read(size)
        self.consumed += len(data)
        return data

    def look(self, until: Callable[[bytes], bool]) -> bytes:
        """The first bytes (at most about 64 KiB), left in place: as many as `until` asks for, or all there are."""
        while len(self._head) < HEAD_BYTES and not until(bytes(self._head)):
            data = self._read(HEAD_BYTES)
            if not data:
                break
            self._ahead += data
        return bytes(self._head)

    def _read(self, size: int) -> bytes:
        try:
            data: bytes = self._inner.read1(size) if hasattr(self._inner, "read1") else self._inner.read(size)
        except EOFError:
            raise self._damaged("the compressed data ends too early") from None
        except (zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise self._damaged(str(error)) from None
        except OSError as error:
            raise Failure(f"{self.name}: cannot be read: {error}") from None
        if len(self._head) < HEAD_BYTES:
            self._head += data[: HEAD_BYTES - len(self._head)]
        return data

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.name}: damaged or truncated after {self.consumed:,} bytes ({what}); what came before it is kept. "
            "Give the whole file under the same name and run the same command again"
        )

    def head(self, consumed: int) -> tuple[str, int]:
        """Hash of the first min(64 KiB, `consumed`) bytes, and their number."""
        part = bytes(self._head[:consumed])
        return hashlib.sha256(part).hexdigest(), len(part)

    def fraction(self) -> float | None:
        """How much of the file on disk has been read, 0 to 1; None for standard input."""
        return self._raw.tell() / self.size if self.size else None


def open_stream(path: str, *, follow: bool = False) -> Tracked:
    """A file, or standard input for `-`, decompressed if it is gzip or zstd. Raises UserError if it cannot be opened.

    `follow`: one that grows, which standard input does by itself and a compressed file cannot.
    """
    if path == "-":
        raw: IO[bytes] = sys.stdin.buffer
        size = None
    else:
        try:
            raw = open(path, "rb")
            size = os.fstat(raw.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a file that can be read, or - for standard input") from None
    buffered: Any = raw
    magic = buffered.peek(4)[:4]
    if size == 0 or not magic:
        raise UserError(f"{path} is empty: no events to replay")
    if magic[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16; convert it first, for example with: iconv -f UTF-16 -t UTF-8")
    if follow and (path == "-" or magic[:2] == b"\x1f\x8b" or magic == b"\x28\xb5\x2f\xfd"):
        raise UserError(f"--follow {path}: only a plain file can grow; leave --follow out, or name one that is not compressed")
    inner: Any = buffered
    if magic[:2] == b"\x1f\x8b":
        inner = gzip.GzipFile(fileobj=buffered)
    elif magic == b"\x28\xb5\x2f\xfd":
        inner = _ZstdReader(buffered)
    return Tracked(path, inner, buffered, None if follow else size)


def first_line(stream: Tracked) -> bytes:
    """The stream's beginning with at least its first line, if that is not longer than 64 KiB."""
    return stream.look(lambda head: b"\n" in head)
