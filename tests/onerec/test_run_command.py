"""`onerec status` and `onerec run` as a user calls them: real processes, a real Triton."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from onerec.monitor.families import AGE_STAGES
from simulator.live import read_written

ONEREC = [sys.executable, "-m", "onerec.cli"]
NOBODY = "127.0.0.1:9"


def onerec(*words: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run([*ONEREC, *map(str, words)], capture_output=True, text=True, timeout=timeout)


def status(folder: Path) -> dict:
    """The JSON of `status` over a folder's state, run and repository, with nobody serving."""
    places = ["--state", folder / "state", "--run", folder / "run", "--repository", folder / "repository"]
    result = onerec("status", *places, "--server", NOBODY, "--json")
    assert result.returncode == 0, result.stderr
    return orjson.loads(result.stdout)


def world(folder: Path) -> list[Path]:
    """A small log and its items."""
    events = folder / "world.jsonl"
    assert onerec("simulate", "--out", events, "--users", 150, "--items", 120, "--days", 2).returncode == 0
    return [events, folder / "world.items.jsonl"]


def test_status_of_nothing_is_no_data(tmp_path: Path) -> None:
    report = status(tmp_path)
    assert list(report) == ["event", "history", "session", "trained", "exported", "served", "event_to_served_ms"]
    assert set(report.values()) == {None}
    places = ["--state", tmp_path / "s", "--run", tmp_path / "r", "--repository", tmp_path / "m", "--server", NOBODY]
    text = onerec("status", *places)
    assert "event → served: no data" in text.stdout
    assert "does not answer" in text.stderr


def test_status_of_a_replayed_log(tmp_path: Path) -> None:
    events, items = world(tmp_path)
    newest = max(orjson.loads(line)["ts"] for line in events.read_bytes().splitlines())
    assert onerec("replay", events, "--items", items, "--state", tmp_path / "state").returncode == 0
    report = status(tmp_path)
    assert report["event"]["watermark_ms"] == newest
    assert report["event"]["age_ms"] == 0
    assert report["history"]["age_ms"] == 300_000
    assert 0 <= report["session"]["age_ms"] < 86_400_000
    assert report["event"]["wall_age_ms"] > 86_400_000
    assert report["trained"] is report["exported"] is report["served"] is report["event_to_served_ms"] is None


def test_damage_is_said_and_does_not_hide_the_rest(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "000000007").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "000000007" / "checkpoint.json").write_text("{")
    (tmp_path / "repository" / "recommend" / "3").mkdir(parents=True)
    places = ["--state", tmp_path / "s", "--run", tmp_path / "run", "--repository", tmp_path / "repository"]
    result = onerec("status", *places, "--server", "nonsense", "--json")
    assert result.returncode == 0
    assert set(orjson.loads(result.stdout).values()) == {None}
    assert len(result.stderr.strip().splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--simulate"),
        (["a.jsonl", "--simulate"], "--simulate"),
        (["--simulate", "--speed", "0"], "--speed"),
        (["--simulate", "--set", "session.gap=1"], "gap_ms"),
        (["--simulate", "--bootstrap", "127.0.0.1:1"], "--kafka"),
        (["a.jsonl", "--rate", "100"], "--simulate"),
        (["--simulate", "--rate", "100", "--speed", "2"], "--speed"),
        (["--simulate", "--users", "100"], "--rate"),
        (["--simulate", "--rate", "1000", "--users", "3"], "--users"),
        (["--simulate", "--rate", "0"], "--rate"),
    ],
)
def test_run_refuses_what_it_cannot_do(tmp_path: Path, words: list[str], said: str) -> None:
    places = ["--state", tmp_path / "s", "--run", tmp_path / "r", "--repository", tmp_path / "m"]
    result = onerec("run", *words, *places)
    assert result.returncode == 2
    assert said in result.stderr


@pytest.mark.parametrize("option", ["--grpc-port", "--triton-metrics-port", "--metrics-port", "--dashboard-port"])
def test_run_names_the_option_of_a_port_that_is_taken(tmp_path: Path, option: str) -> None:
    places = ["--state", tmp_path / "s", "--run", tmp_path / "r", "--repository", tmp_path / "m"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = onerec("run", "--simulate", *places, option, str(taken.getsockname()[1]))
    assert result.returncode == 2
    assert option in result.stderr
    assert "started" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_child_with_a_wrong_request_ends_the_run_with_its_words(tmp_path: Path) -> None:
    places = ["--state", tmp_path / "s", "--run", tmp_path / "r", "--repository", tmp_path / "m"]
    ports = ["--http-port", "0", "--grpc-port", "0", "--triton-metrics-port", "0", "--no-dashboard"]
    result = onerec("run", tmp_path / "missing.jsonl", *places, *ports)
    assert result.returncode == 2
    assert "missing.jsonl" in result.stderr


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Said:
    """What a process writes to standard error, as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.text = ""
        self._process = process
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.text += line

    def wait_for(self, pattern: str, seconds: float, count: int = 1) -> list[str]:
        """The groups of the pattern, once it was said so often."""
        deadline = time.monotonic() + seconds
        while len(found := re.findall(pattern, self.text)) < count:
            assert time.monotonic() < deadline and self._process.poll() is None, f"no {pattern!r} in:\n{self.text}"
            time.sleep(0.1)
        return found


@pytest.mark.slow
def test_run_through_kafka_learns_serves_mends_itself_and_leaves_nothing_running(tmp_path: Path) -> None:
    events, items = world(tmp_path)
    places = ["--state", tmp_path / "state", "--run", tmp_path / "run", "--repository", tmp_path / "repository"]
    words = ["run", events, "--items", items, *places, "--speed", "20000", "--publish-every", "5", "--http-port", "0",
             "--grpc-port", "0", "--triton-metrics-port", "0", "--no-dashboard", "--set", "beam.width=8",
             "--set", "train.threads=1"]
    cluster = [f"kafka.bootstrap=127.0.0.1:{free_port()}", "--set", "kafka.partitions=2"]
    words += ["--kafka", "--workers", "2", "--set", *cluster]
    process = subprocess.Popen([*ONEREC, *map(str, words)], stderr=subprocess.PIPE, text=True)
    said = Said(process)
    try:
        [trainer] = said.wait_for(r"train started \(pid (\d+)\)", 120)
        said.wait_for(r"\(version \d+ answers\)", 400)
        said.wait_for(r"sampler started", 60)
        subprocess.run(["kill", "-9", trainer], check=True)
        carriers = re.findall(r"(?:ingest|stream-1|feed) started \(pid (\d+)\)", said.text)
        subprocess.run(["kill", "-9", *carriers], check=True)
        said.wait_for(r"(?:ingest|stream-1|feed) started", 20, count=6)
        said.wait_for("train was killed by SIGKILL", 20)
        said.wait_for(r"train started", 20, count=2)
        [address] = re.findall(r"Triton gRPC (\S+),", said.text)
        answer = onerec("recommend", "u1", "--server", address, "--json")
        assert len(orjson.loads(answer.stdout)["sessions"][0]["items"]) == 5
        report = orjson.loads(onerec("status", *places, "--server", address, "--json").stdout)
        assert report["event_to_served_ms"] == report["event"]["watermark_ms"] - report["served"]["watermark_ms"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "stopped; the same command goes on from here" in said.text
    started = [int(pid) for pid in re.findall(r"started \(pid (\d+)\)", said.text)]
    assert len(started) >= 6
    assert not [pid for pid in started if alive(pid)]
    here = str(tmp_path).encode()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if alive(int(path.parent.name))]
    assert not [command for command in commands if here in command and (b"tritonserver" in command or b"java" in command)]


def figures(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a metrics page, read as Prometheus does."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(sample.name, frozenset(sample.labels.items())): sample.value for found in families for sample in found.samples}


def labels_of(page: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, label: str) -> set[str]:
    """Values of a label among a metric's samples above zero."""
    return {dict(pairs)[label] for (found, pairs), value in page.items() if found == name and value > 0}


@pytest.mark.slow
def test_a_world_at_live_pace_shows_every_hand_off_on_one_page_and_mends_itself(tmp_path: Path) -> None:
    places = ["--state", tmp_path / "state", "--run", tmp_path / "run", "--repository", tmp_path / "repository"]
    words = ["run", "--simulate", "--rate", "500", "--users", "2500", *places, "--publish-every", "4", "--http-port", "0",
             "--grpc-port", "0", "--triton-metrics-port", "0", "--metrics-port", "0", "--set", "beam.width=8",
             "--set", "train.threads=1", "--set", "preference.ratio=0"]
    process = subprocess.Popen([*ONEREC, *map(str, words)], stderr=subprocess.PIPE, text=True)
    said = Said(process)
    began = int(1000 * time.time())
    try:
        [url] = said.wait_for(r"metrics of all parts (http\S+)", 60)
        assert re.search(r"500 events/s of 2,500 users; its days pass 807 times faster", said.text)
        assert "session.gap_ms=2230" in said.text
        parts = {"simulate", "replay", "train", "serve", "publish", "monitor", "dashboard"}

        def shown() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
            page = figures(url)
            there = labels_of(page, "onerec_age_seconds_count", "stage") == set(AGE_STAGES)
            return page if there and labels_of(page, "onerec_process_up", "process") == parts else {}

        deadline = time.monotonic() + 240
        while not (page := shown()):
            assert time.monotonic() < deadline and process.poll() is None, f"{sorted(figures(url))}\n{said.text}"
            time.sleep(1)
        # One process tells of each stage, and new items and histories are there too.
        assert labels_of(page, "onerec_events_total", "process") == {"replay"}
        assert labels_of(page, "onerec_history_used_age_seconds_count", "replica")
        assert any(name.startswith("nv_") for name, _ in page)
        assert not labels_of(page, "onerec_dead_letters_total", "reason")
        ages = {stage: {name: sum(value for (found, labels), value in page.items() if found == f"onerec_age_seconds_{name}"
                                  and ("stage", stage) in labels) for name in ("sum", "count")} for stage in AGE_STAGES}
        # Live ages: of the run's own time, and later stages no younger than the history.
        means = {stage: age["sum"] / age["count"] for stage, age in ages.items()}
        assert all(0 <= means["history"] <= mean < time.time() - began / 1000 for mean in means.values())
        written = read_written(tmp_path / "run" / "world" / "live.jsonl")
        assert written is not None
        assert began - 1_000 < written.began_ms < began + 60_000

        subprocess.run(["kill", "-9", said.wait_for(r"train started \(pid (\d+)\)", 1)[0]], check=True)
        said.wait_for("train was killed by SIGKILL", 20)
        said.wait_for(r"train started", 20, count=2)
        while labels_of(figures(url), "onerec_process_restarts_total", "process") != {"train"}:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        [address] = re.findall(r"Triton gRPC (\S+),", said.text)
        answer = onerec("recommend", "u1", "--server", address, "--json")
        assert len(orjson.loads(answer.stdout)["sessions"][0]["items"]) == 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    started = [int(pid) for pid in re.findall(r"started \(pid (\d+)\)", said.text)]
    assert len(started) > len(parts)
    assert not [pid for pid in started if alive(pid)]
    here = str(tmp_path).encode()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if alive(int(path.parent.name))]
    assert not [command for command in commands if here in command and b"tritonserver" in command]
    assert not list((tmp_path / "run" / "metrics").glob("*.address"))
