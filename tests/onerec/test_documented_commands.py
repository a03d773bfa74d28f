"""Every `onerec …` line in the docs names a command and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from onerec.cli import build

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LINE = re.compile(r"^(?:\$ )?onerec ([^#\n]*)|`onerec ([^`]*)`", re.MULTILINE)


def uses(page: Path) -> list[list[str]]:
    """Arguments of every call of `onerec` in a page; only what stands in code."""
    found = []
    for block, inline in LINE.findall(page.read_text(encoding="utf-8")):
        text = re.sub(r"\[[^\]]*\]|[…|&]", " ", block or inline).replace("\n", " ")
        try:
            found.append(shlex.split(text))
        except ValueError:
            pytest.fail(f"{page.name}: {text!r} is no shell line")
    return [words for words in found if words]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_and_options_exist(page: Path) -> None:
    commands = typer.main.get_command(build()).commands  # type: ignore[attr-defined]
    for words in uses(page):
        if words[0].startswith("-"):
            continue
        assert words[0] in commands, f"{page.name}: onerec {' '.join(words)}"
        command = commands[words[0]]
        if parts := getattr(command, "commands", None):
            assert len(words) == 1 or words[1] in parts, f"{page.name}: onerec {' '.join(words)}"
            command = parts[words[1]] if len(words) > 1 else command
        known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
        asked = {word.partition("=")[0] for word in words[1:] if word.startswith("--")} - {"--help"}
        assert asked <= known, f"{page.name}: onerec {' '.join(words)}: no {asked - known}"


def test_the_readme_is_checked() -> None:
    assert len(uses(ROOT / "README.md")) >= 10
