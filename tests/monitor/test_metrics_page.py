"""docs/metrics.md tells of every metric there is, and of no other."""

from __future__ import annotations

import re
from pathlib import Path

from onerec.monitor.families import FAMILIES, table

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_holds_the_table_of_the_one_list() -> None:
    found = re.search(
        r"<!-- computed by onerec.monitor.families: begin -->\n\n(.*)\n\n<!-- computed by onerec.monitor.families: end -->",
        PAGE.read_text(encoding="utf-8"), re.DOTALL,
    )
    assert found, "the markers are gone"
    assert found[1] == table(), "put what `python -m onerec.monitor.families` prints between the markers"


def test_the_table_has_a_line_for_every_family_with_its_labels() -> None:
    lines = table().splitlines()[2:]
    assert len(lines) == len(FAMILIES)
    for name, family in FAMILIES.items():
        label = f"{{{','.join(family.labels)}}}" if family.labels else ""
        assert any(line.startswith(f"| `{name}{label}` | {family.kind} | ") for line in lines)


def test_every_metric_that_the_page_names_exists() -> None:
    named = set(re.findall(r"onerec_[a-z_]+", PAGE.read_text(encoding="utf-8")))
    assert named and named <= FAMILIES.keys()
