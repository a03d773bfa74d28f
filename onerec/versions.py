"""Which code is running: the package's version, and a digest of the source that was in force when the process asked."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("exporter", "onerec", "serving_config", "simulator", "streaming", "trainer")
DISTRIBUTION = "onerec-stream"
DIGITS = 12


@cache
def code_version() -> str:
    """`VERSION+DIGEST`: what is installed, and 12 hexadecimal digits of sha256 over every Python module of the project.

    Computed once a process (10 ms); a source edited later changes nothing in what is running.
    """
    try:
        installed = version(DISTRIBUTION)
    except PackageNotFoundError:
        installed = "0"
    return f"{installed}+{source_digest(Path(__file__).resolve().parent.parent)}"


def source_digest(root: Path) -> str:
    """12 hexadecimal digits of sha256 over paths and contents of the modules below `root`, in order of their paths."""
    digest = hashlib.sha256()
    paths = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:DIGITS]
