"""`onerec monitor` over two real Tritons: what each answers, mixed versions, one that is killed and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from watched import GAP_MS, SEMANTICS

from exporter.client import Client
from exporter.publish import load_repository, publish_bundle
from exporter.server import Ports, TritonServer, find_installation
from onerec.errors import UserError
from onerec.monitor.ledger import Ledger
from streaming.store import Store

# The hand-made bundles of the exporter's tests: versions without training.
sys.path.append(str(Path(__file__).parents[1] / "exporter"))
from serving_helpers import builder  # noqa: E402

WAIT_SECONDS = 30


def wait_for(question: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not question():
        assert time.monotonic() < deadline, "that did not come"
        time.sleep(0.1)


class Stream:
    """Writes watches of now into a state."""

    def __init__(self, state: Path) -> None:
        self.store = Store(state, SEMANTICS)
        self._core = self.store.core()

    def watch(self, user: str, before_ms: int = 0) -> int:
        """A watch so long ago; returns its event time."""
        now = time.time_ns() // 1_000_000
        watched = {"type": "watch", "watch_ms": 30_000, "duration_ms": 30_000}
        line = {"user_id": user, "item_id": "v1", "ts": now - before_ms, **watched}
        self.store.commit(self._core, self._core.apply([(0, msgspec.json.encode(line))], now_ms=now), {})
        return now - before_ms


class Scraped:
    """What the monitor's port says."""

    def __init__(self, folder: Path) -> None:
        self._address = folder / "monitor.address"

    def __call__(self, name: str, **labels: str) -> float | None:
        """A sample; None where it is absent."""
        if not self._address.exists():
            return None
        url = f"http://{self._address.read_text().split()[0]}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return None


@contextmanager
def serving(repository: Path, state: Path | None, ports: Ports | None = None) -> Iterator[TritonServer]:
    with TritonServer(repository, state, **({"ports": ports} if ports else {})) as server, Client(server.url) as client:
        load_repository(repository, client)
        yield server


@contextmanager
def monitoring(folder: Path, *servers: str) -> Iterator[subprocess.Popen[bytes]]:
    words = ["--state", "state", "--run", "run", "--repository", "first"]
    words += [word for server in servers for word in ("--server", server)]
    words += ["--set", "monitor.every_s=0.2", "--set", f"metrics.folder={folder}", "--metrics-port", "0"]
    with (folder / "monitor.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "onerec.cli", "monitor", *words], cwd=folder, stdout=log, stderr=log)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_what_replicas_answer_is_told_whatever_becomes_of_them(tmp_path: Path) -> None:
    try:
        find_installation()
    except UserError as error:
        pytest.skip(str(error))
    stream, scraped = Stream(tmp_path / "state"), Scraped(tmp_path)
    stream.watch("u1", 60_000)
    learnt = stream.watch("u2", 50_000)
    stream.watch("u3", 40_000)
    first, second = tmp_path / "first", tmp_path / "second"
    for repository in (first, second):
        publish_bundle(repository, builder(watermark=learnt))

    def told(name: str, server: TritonServer) -> float | None:
        return scraped(f"onerec_{name}", replica=server.url)

    with ExitStack() as stack:
        one = stack.enter_context(serving(first, tmp_path / "state"))
        other = stack.enter_context(serving(second, None))
        with monitoring(tmp_path, one.url, other.url):
            wait_for(lambda: told("replica_up", one) == told("replica_up", other) == 1)
            wait_for(lambda: len(Ledger(tmp_path / "run" / "freshness.jsonl").lines) == 2)
            assert told("replica_version", one) == told("replica_version", other) == 1
            age = time.time() - learnt / 1000
            assert age - WAIT_SECONDS < (told("freshness_seconds", one) or 0) < age + 1
            # What users do now is in the histories of the next answers, of the one host that has them.
            stream.watch("u4")
            newest = stream.watch("u5", -2 * GAP_MS)
            wait_for(lambda: told("history_used_age_seconds_count", one))
            assert told("history_used_age_seconds_count", other) is None
            # One replica gets a version that has learnt more: versions are mixed, and its news have an age.
            assert publish_bundle(first, builder(watermark=newest - 2 * GAP_MS), server=one.url) == 2
            wait_for(lambda: told("replica_version", one) == 2)
            assert told("replica_version", other) == 1
            wait_for(lambda: len(Ledger(tmp_path / "run" / "freshness.jsonl").lines) == 3)
            # One replica is killed: it is down, the other is asked on; it comes back at the same place.
            asked = told("answer_seconds_count", one) or 0
            ports = other.ports
            os.killpg(other.pid, signal.SIGKILL)
            wait_for(lambda: told("replica_up", other) == 0)
            assert told("replica_version", other) is None
            assert told("freshness_seconds", other) is None
            wait_for(lambda: (told("answer_seconds_count", one) or 0) > asked)
            stack.enter_context(serving(second, None, ports))
            wait_for(lambda: told("replica_up", other) == 1)
        with monitoring(tmp_path, one.url, other.url):
            wait_for(lambda: told("replica_version", one) == 2)
    stream.store.close()
    lines = Ledger(tmp_path / "run" / "freshness.jsonl").lines
    assert [(line.replica, line.version) for line in lines[2:]] == [(one.url, 2)], "after a restart nothing is counted twice"
    assert {(line.replica, line.version) for line in lines[:2]} == {(one.url, 1), (other.url, 1)}
    assert lines[2].mode == "live" and lines[2].watermark_ms == newest - 2 * GAP_MS
    said = (tmp_path / "monitor.log").read_text()
    assert f"{other.url} does not answer" in said and "Traceback" not in said
