"""Which partition a key belongs to, as librdkafka's and Java's own partitioners have it, so that any client agrees."""

from __future__ import annotations

import zlib
from typing import Final

CACHED_KEYS: Final = 1_000_000
"""Partitions remembered, about 150 MB at worst; beyond that the memory starts anew."""
_MURMUR_SEED: Final = 0x9747B28C
_MURMUR_M: Final = 0x5BD1E995
_WORD: Final = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """The 32-bit hash of Java's default partitioner (org.apache.kafka.common.utils.Utils.murmur2), unsigned."""
    length = len(data)
    h = (_MURMUR_SEED ^ length) & _WORD
    whole = length & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * _MURMUR_M & _WORD
        k = (k ^ k >> 24) * _MURMUR_M & _WORD
        h = h * _MURMUR_M & _WORD ^ k
    if whole < length:
        h = (h ^ int.from_bytes(data[whole:], "little")) * _MURMUR_M & _WORD
    h = (h ^ h >> 13) * _MURMUR_M & _WORD
    return h ^ h >> 15


def partition_of_bytes(key: bytes, partitions: int, kind: str) -> int:
    """Partition of a key in bytes. `kind`: crc32 (librdkafka's `consistent`) or murmur2 (Java's default).

    Raises ValueError for another kind.
    """
    if kind == "crc32":
        return zlib.crc32(key) % partitions
    if kind == "murmur2":
        return (murmur2(key) & 0x7FFFFFFF) % partitions
    raise ValueError(f"partitioner {kind!r}: crc32 or murmur2")


def partition_of(key: str, partitions: int, kind: str) -> int:
    """Partition of a user or item id among `partitions`. Raises ValueError for a kind other than crc32 and murmur2."""
    return partition_of_bytes(key.encode(), partitions, kind)


class Partitioner(dict[str, int]):
    """`partition_of` for many keys: `partitioner(key)` remembers what it found."""

    def __init__(self, partitions: int, kind: str) -> None:
        super().__init__()
        partition_of("", partitions, kind)
        self.partitions = partitions
        self.kind = kind

    def __missing__(self, key: str) -> int:
        if len(self) >= CACHED_KEYS:
            self.clear()
        found = self[key] = partition_of_bytes(key.encode(), self.partitions, self.kind)
        return found

    def __call__(self, key: str) -> int:
        """The partition of `key`."""
        return self[key]
