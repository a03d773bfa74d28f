"""The catalogue on disk: one folder a codebook version, a pointer to the current one, a journal of new items.

STATE/catalogue/current names the version; STATE/catalogue/<version>/ holds the manifest with the sha256 of every file,
and `new_items.jsonl`, which only grows. A line of the journal counts once a commit line after it does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from onerec.errors import Failure, UserError
from onerec.files import sha256_of, sync_path

FORMAT = "onerec-catalogue"
FORMAT_VERSION = 1
JOURNAL = "new_items.jsonl"


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a version is and what its files must be.

    `fitted`: the first rows of `codes.npy`, those that the codebook was fitted on; `errors`: mean squared residual
    before and after every level, None without vectors; `last_item`, `last_session`: what new items come after.
    """

    format: str
    format_version: int
    version: str
    levels: int
    codes: int
    items: int
    fitted: int
    method: str
    space: str
    dimension: int | None
    errors: list[float] | None
    origins: dict[str, int]
    left_out: list[str]
    last_item: int
    last_session: int
    until: int | None
    files: dict[str, str]


def folder_of(state_dir: Path) -> Path:
    """Where the catalogue of a state lies."""
    return Path(state_dir) / "catalogue"


def current_version(state_dir: Path) -> str | None:
    """The version that the pointer names, None where no catalogue was built."""
    try:
        return (folder_of(state_dir) / "current").read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Failure(f"catalogue of {state_dir}: pointer unreadable: {error.strerror}; check permissions") from None


def array_bytes(array: NDArray[Any]) -> bytes:
    """An array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_version(state_dir: Path, manifest: Manifest, files: dict[str, bytes]) -> None:
    """Put a version in place and make it current; killed at any moment, the old catalogue or the new one is there.

    A version whose files are there already, whole, keeps its journal of new items. Raises Failure if the disk refuses.
    """
    root = folder_of(state_dir)
    target = root / manifest.version
    staging = root / f".staging-{os.getpid()}"
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = msgspec.structs.replace(manifest, files=digests)
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for name, data in {**files, "manifest.json": orjson.dumps(msgspec.to_builtins(manifest))}.items():
            _write_synced(staging / name, data)
        if _is_whole(target, digests):
            os.replace(staging / "manifest.json", target / "manifest.json")
            shutil.rmtree(staging)
        else:
            if target.exists():
                broken = root / f".broken-{os.getpid()}"
                os.replace(target, broken)
                shutil.rmtree(broken, ignore_errors=True)
            os.replace(staging, target)
        pointer = root / f".current-{os.getpid()}"
        _write_synced(pointer, manifest.version.encode() + b"\n")
        os.replace(pointer, root / "current")
        sync_path(root)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise Failure(f"catalogue {root} cannot be written: {error.strerror}; make room or give write permission and "
                      "run `onerec items --build` again; the catalogue in force is as it was") from None


def read_version(state_dir: Path, version: str) -> tuple[Manifest, dict[str, bytes]]:
    """Manifest and files of a version, each checked against its sha256.

    Raises UserError for a version that is missing, foreign, of another format or corrupt.
    """
    folder = folder_of(state_dir) / version
    remedy = f"build it again: onerec items --state {state_dir} --build"
    try:
        table = orjson.loads((folder / "manifest.json").read_bytes())
    except FileNotFoundError:
        raise UserError(f"catalogue {folder} is not there; {remedy}") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"catalogue {folder}: manifest.json is unreadable ({error}); {remedy}") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise UserError(f"catalogue {folder} was not written by onerec; move it away and {remedy}")
    if table.get("format_version") != FORMAT_VERSION:
        raise UserError(f"catalogue {folder} has format {table.get('format_version')}, this onerec reads "
                        f"{FORMAT_VERSION}; {remedy}")
    try:
        manifest = msgspec.convert(table, Manifest)
    except msgspec.ValidationError as error:
        raise UserError(f"catalogue {folder}: manifest.json is damaged ({error}); {remedy}") from None
    files = {}
    for name, digest in manifest.files.items():
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"catalogue {folder}: {name} cannot be read ({error.strerror}); {remedy}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"catalogue {folder}: {name} is corrupt (its sha256 is not the manifest's); {remedy}")
        files[name] = data
    if manifest.version != version:
        raise UserError(f"catalogue {folder} holds version {manifest.version}; {remedy}")
    return manifest, files


def read_array(data: bytes) -> NDArray[Any]:
    """The array of an .npy file's bytes."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def read_journal(state_dir: Path, version: str, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Committed entries from byte `offset` on, and the offset behind them; a torn or uncommitted tail is left."""
    path = folder_of(state_dir) / version / JOURNAL
    try:
        with path.open("rb") as journal:
            journal.seek(offset)
            data = journal.read()
    except FileNotFoundError:
        return [], offset
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror}; check permissions") from None
    entries: list[dict[str, Any]] = []
    committed, end, place = 0, offset, offset
    for line in data.splitlines(keepends=True):
        place += len(line)
        if not line.endswith(b"\n"):
            break
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError:
            raise UserError(f"{path} is corrupt before byte {place}; delete it, and new items get their codes again, "
                            "or put it back from a copy") from None
        entries.append(entry)
        if "commit" in entry:
            committed, end = len(entries), place
    return entries[:committed], end


def append_journal(state_dir: Path, version: str, entries: list[dict[str, Any]], offset: int) -> int:
    """Write entries, the last of which commits them, at byte `offset` (a torn tail goes); returns the offset behind."""
    path = folder_of(state_dir) / version / JOURNAL
    data = b"".join(orjson.dumps(entry) + b"\n" for entry in entries)
    try:
        with path.open("r+b" if path.exists() else "x+b") as journal:
            journal.truncate(offset)
            journal.seek(offset)
            journal.write(data)
            journal.flush()
            os.fsync(journal.fileno())
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}; make room or give write permission") from None
    return offset + len(data)


@contextlib.contextmanager
def journal_lock(state_dir: Path, version: str) -> Iterator[bool]:
    """One process at a time gives codes to new items; yields False where this process may not write there."""
    path = folder_of(state_dir) / version / ".lock"
    try:
        handle = path.open("w")
    except OSError:
        yield False
        return
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield True


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(folder: Path, digests: dict[str, str]) -> bool:
    """Whether a version lies there already with these very files, so that its journal goes on counting."""
    try:
        return all(sha256_of(folder / name) == digest for name, digest in digests.items())
    except OSError:
        return False
