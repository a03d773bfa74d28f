"""Titles of items for people who look; neither the stream nor the model keeps any."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec

from onerec.errors import UserError
from streaming.streams import open_stream


class _Entry(msgspec.Struct):
    item_id: str
    title: str | None = None


def read_titles(path: Path) -> dict[str, str]:
    """Titles by item id, of JSON lines with `item_id` and `title`; lines without a title, or with another `item_id`, are
    passed over. The file may be gzip or zstd. Raises UserError where it holds none.
    """
    decoder = msgspec.json.Decoder(_Entry)
    titles: dict[str, str] = {}
    with open_stream(str(path)) as stream, io.BufferedReader(stream) as lines:
        for line in lines:
            try:
                entry = decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
            if entry.title:
                titles[entry.item_id] = entry.title
    if not titles:
        raise UserError(f"--names {path} holds no title; it is of JSON lines with `item_id` and `title`")
    return titles
