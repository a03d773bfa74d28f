"""A catalogue entry as the stream keeps it (SEMANTICS.md §1, `item` events)."""

from __future__ import annotations

import msgspec


class ItemRecord(msgspec.Struct, kw_only=True, array_like=True):
    """One item: `ts` its event time in ms; `embedding` float32 values or None; `tags` category ids."""

    item_id: str
    ts: int
    duration_ms: int | None = None
    tags: list[str] = []
    author_id: str | None = None
    embedding: list[float] | None = None


_VERSION = b"\x01"
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ItemRecord)


def encode_item(item: ItemRecord) -> bytes:
    """The versioned value of column family `items`."""
    return _VERSION + _encoder.encode(item)


def decode_item(value: bytes) -> ItemRecord:
    """Inverse of `encode_item`."""
    return _decoder.decode(value[1:])
