"""Real processes on a real broker tell over HTTP how far they are behind, what they took in and what they refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from patience import PATIENCE, TooSlow

from streaming.kafka.producing import Produce
from streaming.kafka.settings import KafkaConfig

T0 = 1_700_000_000_000
MINUTE = 60_000
USERS = 6
WATCHES = 8


def a_log() -> list[bytes]:
    """One session a user, one event twice, two lines that are no event."""
    lines = [
        orjson.dumps({
            "type": "watch", "user_id": f"u{user}", "item_id": f"i{k}", "ts": T0 + k * MINUTE + user, "watch_ms": 9_000,
            "duration_ms": 10_000,
        })
        for k in range(WATCHES) for user in range(USERS)
    ]
    return [*lines, lines[-1], b"garbage", b'{"type":"nothing"}']


class Processes:
    """Commands of `onerec`, each with its metrics on a free port."""

    def __init__(self, config: KafkaConfig, folder: Path, scrape: Callable[[str], Any]) -> None:
        self._folder, self._scrape = folder, scrape
        self._settings = ["--bootstrap", config.bootstrap, "--metrics-port", "0"]
        for setting in (
            f'kafka.prefix="{config.prefix}"', f"kafka.partitions={config.partitions}", "stream.idle_ms=500",
            f"metrics.folder={folder}",
        ):
            self._settings += ["--set", setting]
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._started[name] = subprocess.Popen(
                [sys.executable, "-m", "onerec.cli", name, *words, *self._settings], stdout=log, stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def wait(self, name: str, true: Callable[[Any], bool]) -> Any:
        """What the process serves, once it is so."""
        deadline = time.monotonic() + PATIENCE * 30
        found = None
        while time.monotonic() < deadline:
            assert self._started[name].poll() is None, (self._folder / f"{name}.log").read_text()[-2_500:]
            path = self._folder / f"{name}.address"
            if path.exists():
                found = self._scrape(path.read_text().split()[0])
                if true(found):
                    return found
            time.sleep(0.2)
        said = (self._folder / f"{name}.log").read_text()[-2_500:]
        raise TooSlow(f"{name} does not get there:\n{said}\n{'no metrics' if found is None else found.text}")

    def end(self) -> None:
        for process in self._started.values():
            process.terminate()
        for process in self._started.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def config(cluster: Callable[..., KafkaConfig]) -> KafkaConfig:
    return cluster(partitions=2)


@pytest.fixture
def processes(config: KafkaConfig, tmp_path: Path, scrape: Callable[[str], Any]) -> Iterator[Processes]:
    running = Processes(config, tmp_path, scrape)
    yield running
    running.end()


def read(source: str) -> Callable[[Any], bool]:
    """Whether nothing of the source is left in either partition."""
    return lambda found: all(found("onerec_lag_offsets", source=source, partition=p) == 0 for p in "01")


@pytest.mark.slow
def test_every_process_on_kafka_tells_its_lag_and_what_it_did(
    config: KafkaConfig, processes: Processes, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(line + b"\n" for line in a_log()))
    for name, *words in (
        ("ingest",), ("stream", "--engine", "group", "--state", str(tmp_path / "worker")),
        ("feed", "--state", str(tmp_path / "fed")), ("histories-replica", "--state", str(tmp_path / "histories")),
    ):
        processes.start(name, *words)
    Produce(config, [str(log)], future_ms=0, end=True).run()
    events = USERS * WATCHES + 1
    newest = (T0 + (WATCHES - 1) * MINUTE + USERS - 1) / 1000

    ingest = processes.wait("ingest", lambda found: found("onerec_events_total") == events and all(
        read(source)(found) for source in ("watch", "interactions", "items")
    ))
    assert ingest("onerec_dead_letters_total", reason="not_json") == 1
    assert ingest("onerec_dead_letters_total", reason="bad_type") == 1
    assert ingest("onerec_dead_letters_total", reason="bad_ts") == 0
    assert {ingest("onerec_lag_seconds", source=source) for source in ("watch", "interactions", "items")} == {0}
    assert ingest("onerec_watermark_seconds", stage="event") == newest
    assert ingest("onerec_recovery_seconds") > 0
    assert ingest("onerec_users") is None and ingest("onerec_state_bytes") is None

    stream = processes.wait("stream", lambda found: (
        sum(found.series("onerec_sessions_total").values()) == USERS and found("onerec_open_sessions") == 0
        and read("events")(found)
    ))
    assert stream("onerec_events_total") == events and stream("onerec_duplicates_total") == 1
    assert stream("onerec_users") == USERS
    assert stream("onerec_lag_seconds", source="events") == 0
    assert stream("onerec_age_seconds_count", stage="history") == events
    assert stream("onerec_age_seconds_count", stage="session") == USERS * WATCHES
    assert stream("onerec_watermark_seconds", stage="event") == newest
    assert stream("onerec_state_bytes") > 0 and stream("onerec_recovery_seconds") > 0

    feed = processes.wait("feed", lambda found: read("sessions")(found) and found("onerec_watermark_seconds", stage="session"))
    assert feed("onerec_lag_seconds", source="sessions") == 0
    assert feed("onerec_dead_letters_total", reason="left_out") == 0
    assert feed("onerec_events_total") is None

    histories = processes.wait("histories-replica", lambda found: read("histories")(found) and found("onerec_users") == USERS)
    assert histories("onerec_watermark_seconds", stage="history") is not None
