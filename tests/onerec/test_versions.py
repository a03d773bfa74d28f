"""The code version changes with the code and with nothing else."""

import re
from pathlib import Path

from onerec.versions import code_version, source_digest


def test_it_is_the_installed_version_and_a_digest() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\+[0-9a-f]{12}", code_version())


def test_the_digest_tells_contents_and_names_apart_and_ignores_what_is_no_code(tmp_path: Path) -> None:
    module = tmp_path / "trainer" / "a.py"
    module.parent.mkdir()
    module.write_text("x = 1\n")
    first = source_digest(tmp_path)
    (tmp_path / "trainer" / "notes.txt").write_text("no code")
    (tmp_path / "other.py").write_text("no package")
    assert source_digest(tmp_path) == first
    module.write_text("x = 2\n")
    second = source_digest(tmp_path)
    module.rename(module.with_name("b.py"))
    assert len({first, second, source_digest(tmp_path)}) == 3
