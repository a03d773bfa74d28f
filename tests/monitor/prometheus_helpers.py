"""A real Prometheus with the shipped rules at a pace for tests, and real `onerec` processes for it to look at."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onerec.closing import Closing

ROOT = Path(__file__).parents[2]
RULES = ROOT / "serving_config" / "prometheus" / "rules.yml"
FASTER = 60
"""A minute of the shipped rules is a second here."""
MS = {"s": 1_000, "m": 60_000, "h": 3_600_000}
WAIT_SECONDS = 180.0
"""A limit for a busy machine; on a quiet one an alert takes seconds."""


def shortened(rules: str) -> str:
    """The rules with every duration (`for: 5m`, `[10m]`) divided by FASTER; nothing else is changed."""
    def shorter(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) * MS[found[3]] // FASTER}ms{found[4]}"

    return re.sub(r"(for: |\[)(\d+)([smh])(\]|$)", shorter, rules, flags=re.MULTILINE)


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def wait_until(true: Callable[[], object], what: Callable[[], str], seconds: float = WAIT_SECONDS) -> None:
    """Until `true()`; fails with `what()` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what()}"
        time.sleep(0.1)


def ends_with_parent() -> None:
    """Lets a child end when the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Program(Closing):
    """A child process with its own log; killed at the end, stopped or not."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                            preexec_fn=ends_with_parent)

    @property
    def tail(self) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-2_000:]

    def send(self, number: int) -> None:
        """A signal."""
        self.process.send_signal(number)

    def close(self) -> None:
        """SIGKILL, as all is thrown away; but a server of Triton takes its folders along by itself."""
        if "serve" in self.process.args:  # type: ignore[operator]
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                pass
        self.process.kill()
        self.process.wait()


def onerec(folder: Path, name: str, *words: str | Path, small: bool = False) -> Program:
    """A long-running `onerec` command; its log is `folder`/`name`.log. `small`: with the smallest of models."""
    main = [str(Path(__file__).with_name("small_onerec.py"))] if small else ["-m", "onerec.cli"]
    return Program([sys.executable, *main, *map(str, words)], folder / f"{name}.log")


class Prometheus(Closing):
    """Scrapes `targets`, job → host:port, twice a second, with the shipped rules at FASTER pace."""

    def __init__(self, folder: Path, targets: dict[str, str]) -> None:
        program = shutil.which("prometheus")
        if program is None:
            pytest.skip("prometheus is not installed: it is a package of Debian")
        folder.mkdir()
        (folder / "rules.yml").write_text(shortened(RULES.read_text(encoding="utf-8")), encoding="utf-8")
        jobs = [{"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()]
        often = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "200ms"}
        config = {"global": often, "rule_files": ["rules.yml"], "scrape_configs": jobs}
        (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
        self.address = f"127.0.0.1:{free_port()}"
        self._program = Program([
            program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.address}", "--log.level=warn",
        ], folder / "prometheus.log")
        wait_until(lambda: self._answers("/-/ready"), lambda: self._program.tail)

    def close(self) -> None:
        """Ends it."""
        self._program.close()

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _api(self, path: str, **values: str) -> Any:
        query = urllib.parse.urlencode(values)
        with urllib.request.urlopen(f"http://{self.address}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series of an expression, now."""
        return [(series["metric"], float(series["value"][1])) for series in self._api("query", query=expression)["result"]]

    def wait_for_value(self, expression: str, value: float, seconds: float = WAIT_SECONDS) -> None:
        """Until an expression has one series, of this value."""
        wait_until(lambda: [found for _, found in self.query(expression)] == [value],
                   lambda: f"{expression} is {value:g}: {self.query(expression)}", seconds)

    def firing(self) -> dict[str, list[str]]:
        """Summaries of what fires now, by alert."""
        found: dict[str, list[str]] = {}
        for alert in self._api("alerts")["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert["annotations"]["summary"])
        return found

    def wait_for(self, alert: str, seconds: float = WAIT_SECONDS) -> str:
        """The first summary of an alert, once it fires."""
        wait_until(lambda: alert in self.firing(), lambda: f"{alert} fires; firing: {self.firing()}", seconds)
        return self.firing().get(alert, [""])[0]

    def wait_for_end(self, alert: str, seconds: float = WAIT_SECONDS) -> None:
        """Until the alert does not fire."""
        wait_until(lambda: alert not in self.firing(), lambda: f"{alert} clears; firing: {self.firing()}", seconds)
