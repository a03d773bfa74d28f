"""Tables computed from measured figures, put between the markers of a document, so that nobody types a figure."""

from __future__ import annotations

from pathlib import Path

from onerec.errors import UserError


def put_between(path: Path, program: str, text: str) -> None:
    """Replaces what stands between `program`'s markers. Raises UserError where the document has not both."""
    begin, end = f"<!-- computed by {program}: begin -->", f"<!-- computed by {program}: end -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise UserError(f"{path} has not both markers; put these where the tables belong: {begin} {end}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
