"""What replay and the workers tell of themselves is what they did: real RocksDB, real files, metrics over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onerec.config import Config, load_config
from onerec.monitor.metrics import Metrics
from onerec.monitor.of_stream import MOST, ReplayMetrics, WorkerMetrics, event_times, folder_bytes, lines_of, spread
from streaming.changes import Changes, Counters, DeadLetter
from streaming.events import REASONS, Rejected, Row, decode
from streaming.kafka.engine import PartitionStatus
from streaming.kafka.partitions import Commit
from streaming.kafka.wire import Chunk, pack
from streaming.replay import Replay
from streaming.rocks import database_path
from streaming.store import Store

Scrape = Callable[[str], Any]
T0 = 1_700_000_000_000
MINUTE = 60_000
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def watch(user: str, item: str, ts: int, watch_ms: int = 9_000) -> bytes:
    return orjson.dumps(
        {"type": "watch", "user_id": user, "item_id": item, "ts": ts, "watch_ms": watch_ms, "duration_ms": 10_000}
    )


def a_log(start: int = T0) -> list[bytes]:
    """Two users, three sessions of theirs; a repeat, two late events (one of them used), and lines that are refused."""
    lines = [watch("a", f"i{k}", start + k * MINUTE) for k in range(6)]
    lines += [watch("b", f"i{k}", start + k * MINUTE + 1) for k in range(3)]
    lines += [lines[0], b"garbage", b'{"type":"nothing"}', b"more garbage"]
    # Five hours on: everything before is final, and what comes from then is late.
    lines += [watch("a", f"j{k}", start + (300 + k) * MINUTE) for k in range(4)]
    lines += [watch("b", "used", start + 7 * MINUTE), watch("b", "unused", start + 8 * MINUTE, 0)]
    return lines


def written(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


class Command:
    """`onerec replay` as a process, its metrics on a port of its own choice."""

    def __init__(self, *words: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "onerec.cli", "replay", *words, "--metrics-port", "0", "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def address(self) -> str:
        """As said on standard error once it lingers."""
        assert self._popen.stderr is not None
        line = self._popen.stderr.readline()
        found = re.search(r"http://([\d.]+:\d+)/metrics", line)
        assert found, line + self._popen.stderr.read()
        return found[1]

    def running(self) -> bool:
        return self._popen.poll() is None

    def end(self, number: int | None = None) -> tuple[dict[str, Any], int]:
        """The final line and the exit code, after a signal if one is given."""
        if number is not None:
            self._popen.send_signal(number)
        out, _ = self._popen.communicate(timeout=60)
        return json.loads(out), self._popen.returncode

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()


@pytest.fixture
def command() -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(*words: str) -> Command:
        started.append(Command(*words))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_a_short_replay_stays_up_until_scraped_and_its_counts_are_those_of_its_final_line(
    tmp_path: Path, command: Callable[..., Command], scrape: Scrape
) -> None:
    state = tmp_path / "state"
    job = command(str(written(tmp_path / "log.jsonl", a_log())), "--state", str(state))
    address = job.address()
    # The state is free again, though the process is still there.
    with Store(state, Config().semantics) as store:
        sessions = [session for _, session in store.sessions()]
    assert job.running()
    found = scrape(address)
    final, code = job.end()
    assert code == 0
    assert found("onerec_events_total") == final["events"] == 16
    assert found("onerec_duplicates_total") == final["duplicates"] == 1
    late = {outcome: found("onerec_late_total", outcome=outcome) for outcome in ("history", "ignored")}
    assert late == {"history": 1, "ignored": 1} and final["late"] == 2
    dead = {reason: found("onerec_dead_letters_total", reason=reason) for reason in REASONS}
    assert {reason: count for reason, count in dead.items() if count} == {"not_json": 2, "bad_type": 1}
    assert None not in dead.values() and sum(count or 0 for count in dead.values()) == final["dead_letters"]
    high, low = (found("onerec_sessions_total", quality=quality) for quality in ("high", "low"))
    assert high == final["high_quality"] and high + low == final["sessions"] == 3
    assert found("onerec_users") == final["users"] == 2
    assert found("onerec_open_sessions") == 0
    newest = (T0 + 303 * MINUTE) / 1000
    assert found("onerec_watermark_seconds", stage="event") == newest
    assert found("onerec_watermark_seconds", stage="history") == final["watermark"] / 1000
    assert found("onerec_watermark_seconds", stage="session") == max(session.end for session in sessions) / 1000
    assert found("onerec_log_clock_seconds") == newest
    assert found("onerec_age_seconds_count", stage="history") == final["events"]
    ages = [newest - item.ts / 1000 for session in sessions for item in session.items]
    assert found("onerec_age_seconds_count", stage="session") == len(ages)
    assert found("onerec_age_seconds_sum", stage="session") == pytest.approx(sum(ages))
    assert 0 < found("onerec_state_bytes") and 0 < found("onerec_recovery_seconds") < 60
    # Flat out the end of the log is not known.
    assert not found.series("onerec_lag_seconds") and not found.series("onerec_log_factor")


def test_a_replay_that_has_ended_goes_when_it_is_told_to(tmp_path: Path, command: Callable[..., Command]) -> None:
    job = command(str(written(tmp_path / "log.jsonl", a_log())), "--state", str(tmp_path / "state"))
    job.address()
    final, code = job.end(signal.SIGTERM)
    assert code == 0 and final["events"] == 16


def test_a_replay_that_must_not_stay_ends_at_once(tmp_path: Path) -> None:
    words = ["replay", str(written(tmp_path / "log.jsonl", a_log())), "--state", str(tmp_path / "state"), "--metrics-port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "onerec.cli", *words, "--set", "metrics.linger=false"],
        capture_output=True, text=True, timeout=60, env=ENVIRONMENT,
    )
    assert done.returncode == 0 and "stay on" not in done.stderr


def replayed(metrics: Metrics, state: Path, path: Path, config: Config, **options: Any) -> dict[str, Any]:
    with Store(state, config.semantics) as store:
        measured = ReplayMetrics(metrics, config, database_path(state), store.counters(), time.monotonic())
        return Replay(store, [str(path)], on_step=measured, on_ready=measured.ready, **options).run()


def test_a_replay_that_goes_on_counts_what_it_did_itself(tmp_path: Path, scrape: Scrape) -> None:
    lines = a_log()
    path, state = tmp_path / "log.jsonl", tmp_path / "state"
    with Metrics("replay", 0) as metrics:
        first = replayed(metrics, state, written(path, lines[:8]), Config(), flush=False)
        assert metrics.address is not None
        found = scrape(metrics.address)
        assert found("onerec_events_total") == first["events"] == 8
        assert found("onerec_open_sessions") == 2
    with Metrics("replay", 0) as metrics:
        total = replayed(metrics, state, written(path, lines), Config())
        assert metrics.address is not None
        found = scrape(metrics.address)
        assert found("onerec_events_total") == total["events"] - first["events"]
        assert found("onerec_users") == total["users"]
        assert found("onerec_open_sessions") == 0


def test_in_live_time_ages_are_against_the_wall_clock(tmp_path: Path, scrape: Scrape) -> None:
    now = time.time_ns() // 1_000_000
    lines = [watch("a", f"i{k}", now - 20_000 + k) for k in range(50)]
    with Metrics("replay", 0) as metrics:
        replayed(metrics, tmp_path / "state", written(tmp_path / "log.jsonl", lines), Config(), flush=False)
        assert metrics.address is not None
        found = scrape(metrics.address)
    count, total = (found(f"onerec_age_seconds_{part}", stage="history") for part in ("count", "sum"))
    assert count == 50 and 19 * 50 < total
    assert found("onerec_log_factor") == 1
    assert found("onerec_log_clock_seconds") >= now / 1000
    assert found("onerec_age_seconds_count", stage="session") is None


def test_a_log_at_a_pace_tells_how_much_of_it_is_overdue(tmp_path: Path, scrape: Scrape) -> None:
    path = written(tmp_path / "log.jsonl", [watch("a", f"i{k}", T0 + k * 1_000) for k in range(200)])
    with Metrics("replay", 0) as metrics:
        replayed(metrics, tmp_path / "state", path, Config(), speed=1_000.0)
        assert metrics.address is not None
        assert scrape(metrics.address)("onerec_lag_seconds", source="files") == 0


def test_open_users_are_those_whose_sessions_are_not_final(tmp_path: Path) -> None:
    """Counted as it goes on and after a restart, against the state itself."""
    generator = np.random.default_rng(0)
    times = np.sort(generator.integers(0, 12 * 60, 400)) * MINUTE + T0
    lines = [
        watch(f"u{generator.integers(12)}", f"i{k}", int(ts) - int(generator.integers(0, 8)) * MINUTE)
        for k, ts in enumerate(times)
    ]
    state = tmp_path / "state"
    seen: list[int] = []
    for part in (150, 300, 400):
        path = written(tmp_path / "log.jsonl", lines[:part])
        with Store(state, Config().semantics) as store:
            Replay(
                store, [str(path)], flush=False, max_batch=37, on_step=lambda step: seen.append(step.changes.open_users)
            ).run()
        with Store(state, Config().semantics) as store:
            waiting = {user for _, user in store.core()._due}  # noqa: SLF001 - what is stored, not what was counted
            assert seen[-1] == len(waiting) > 0 and store.counters().sessions > 0


def test_samples_are_even_and_bounded() -> None:
    assert list(spread([1, 2, 3], 3)) == [1, 2, 3]
    assert list(spread(list(range(7)), 3)) == [0, 3, 6]


@given(st.integers(1, 5_000), st.integers(1, 300))
def test_a_sample_reaches_over_the_whole(size: int, most: int) -> None:
    found = spread(list(range(size)), most)
    assert len(found) <= most and found[0] == 0
    steps = np.diff([*found, size])
    assert steps.max(initial=1) <= -(-size // most)


def test_times_of_what_is_no_event_are_left_out() -> None:
    row = Row(b"1,2", [decode(watch("u", "i", T0 + 5), 2 * T0), Rejected("bad_ts")])
    assert event_times([watch("u", "i", T0), b"", b"garbage", row]).tolist() == [T0, T0 + 5]


def test_the_size_of_a_folder_that_is_not_there_is_not_known(tmp_path: Path) -> None:
    assert folder_bytes(tmp_path / "none") is None
    (tmp_path / "a").write_bytes(b"12345")
    assert folder_bytes(tmp_path) == 5


def commit(partition: int, lines: list[bytes], *, timestamp: int = 0, watermark: int = T0, **changed: Any) -> Commit:
    changes = Changes({}, [], [DeadLetter((0, 0), b"", reason) for reason in changed.pop("dead", ())], [], **changed)
    return Commit(partition, [Chunk(0, timestamp, pack(lines), 0)], changes, Counters(events=len(lines)), watermark)


def engine(*found: PartitionStatus, users: int | None = 3) -> Any:
    return SimpleNamespace(status=lambda: list(found), users=lambda: users, restored_seconds=0.25)


def test_a_worker_tells_lag_by_partition_and_forgets_what_it_does_not_hold(tmp_path: Path) -> None:
    metrics = Metrics("stream")
    measured = WorkerMetrics(metrics, load_config(None, ["freshness.clock=log"]), tmp_path)
    wall = time.time_ns() // 1_000_000
    measured.committed(commit(0, [watch("a", "i", T0)], timestamp=wall - 60_000, open_users=2, dead=["bad_ts"]))
    measured.committed(commit(1, [watch("b", "i", T0)], timestamp=wall - 10_000, open_users=1, watermark=T0 + 5_000))

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    def status(partition: int, lag: int | None, watermark: int | None = T0) -> PartitionStatus:
        return PartitionStatus(partition, "running", watermark, lag, 0.0)

    measured.seen(engine(status(0, 40), status(1, 0, T0 + 5_000), status(2, None, None)))
    assert value("onerec_lag_offsets", source="events", partition="0") == 40
    assert value("onerec_lag_offsets", source="events", partition="1") == 0
    assert value("onerec_lag_offsets", source="events", partition="2") is None
    assert 59 < (value("onerec_lag_seconds", source="events") or 0) < 120
    assert value("onerec_watermark_seconds", stage="history") == T0 / 1000
    assert value("onerec_open_sessions") == 3 and value("onerec_users") == 3
    assert value("onerec_recovery_seconds") == 0.25
    assert value("onerec_events_total") == 2 and value("onerec_dead_letters_total", reason="bad_ts") == 1
    # Another worker has taken partition 0 over.
    measured.seen(engine(status(1, 0, T0 + 5_000)))
    assert value("onerec_lag_offsets", source="events", partition="0") is None
    assert value("onerec_lag_seconds", source="events") == 0
    assert value("onerec_open_sessions") == 1
    measured.ended()
    assert value("onerec_lag_seconds", source="events") is None
    assert value("onerec_events_total") == 2


def test_lines_are_sampled_from_all_messages_of_a_commit() -> None:
    chunks = [Chunk(k, 0, pack([b"%d:%d" % (k, line) for line in range(200)]), k) for k in range(8)]
    lines = lines_of(chunks)
    assert len(lines) <= MOST and {line.split(b":")[0] for line in lines} == {b"%d" % k for k in range(8)}
