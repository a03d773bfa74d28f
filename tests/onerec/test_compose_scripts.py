"""The small shell scripts in docker-compose.yml, run by a shell with an `onerec` that writes down how it was called."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, Any] = YAML(typ="safe").load(ROOT / "docker-compose.yml")["services"]


class Shell:
    """Runs the script of a service on a folder for /data; `calls` are those of the stand-ins made by `program`."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.data.mkdir()
        self._bin = folder / "bin"
        self._bin.mkdir()
        self._log = folder / "calls"

    def program(self, name: str, *lines: str) -> None:
        body = "\n".join([f'echo "{name} $*" >> {self._log}', *lines])
        (self._bin / name).write_text(f"#!/bin/sh\ncd {self.data}\n{body}\n")
        (self._bin / name).chmod(0o755)

    def run(self, service: str) -> int:
        script = SERVICES[service]["command"][0].replace("$$", "$").replace("/data/", f"{self.data}/")
        script = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", script)
        entrypoint = SERVICES[service]["entrypoint"]
        environment = {"PATH": f"{self._bin}:{os.environ['PATH']}"}
        return subprocess.run([*entrypoint, script], env=environment, timeout=60, capture_output=True).returncode

    @property
    def calls(self) -> list[str]:
        text = self._log.read_text() if self._log.exists() else ""
        return text.replace(f"{self.data}/", "/data/").splitlines()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_the_world_is_simulated_once(shell: Shell) -> None:
    (shell.data / "world").mkdir()
    shell.program("onerec", "touch world/events.jsonl.gz")
    assert shell.run("simulate") == 0
    assert shell.run("simulate") == 0
    assert shell.calls == ["onerec simulate --out /data/world/events.jsonl.gz"]


def test_training_begins_with_enough_sessions_and_ends_as_the_trainer_does(shell: Shell) -> None:
    # Every look finds 200 sessions more; the first finds no state at all.
    shell.program(
        "onerec", '[ "$1" = sessions ] || exit 7', "[ -e looked ] || { touch looked; exit 2; }", "echo >> looks",
        "seq $((200 * $(wc -l < looks)))",
    )
    shell.program("sleep")
    assert shell.run("train") == 7
    look = "onerec sessions --state /data/feed --limit 500 --json"
    *waiting, last = shell.calls
    assert waiting == [look, "sleep 10", look, "sleep 10", look, "sleep 10", look]
    assert last.startswith("onerec train --state /data/feed --run /data/run --follow ")
