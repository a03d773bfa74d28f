"""`onerec feed` on a real broker: every session once, in one order, whatever dies, and clear words where some are gone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import TopicPartition
from feeding import T0, Worker, session
from patience import PATIENCE

from onerec.errors import Failure, OneRecError, UserError
from streaming.items import ItemRecord
from streaming.kafka import topics
from streaming.kafka.feeder import Feeder
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Tail
from streaming.kafka.wire import session_message
from streaming.sessions import Session, session_json
from streaming.store import Reader, Store

Cluster = Callable[..., KafkaConfig]


@pytest.fixture
def config(cluster: Cluster) -> KafkaConfig:
    return cluster(partitions=3, stall_seconds=3)


@pytest.fixture
def worker(config: KafkaConfig) -> Iterator[Worker]:
    with Worker(config) as worker:
        yield worker


def fed(config: KafkaConfig, state: Path, said: list[str] | None = None, **options: Any) -> Feeder:
    """Feeds to the end; the feeder is closed."""
    with Feeder(config, state, say=(said if said is not None else []).append, **options) as feeder:
        deadline = time.monotonic() + PATIENCE * 30
        while feeder.step() or not feeder.finished():
            assert time.monotonic() < deadline, feeder.status()
    return feeder


def log(state: Path) -> list[bytes]:
    with Reader(state) as reader:
        return [session_json(found) for _, found in reader.sessions()]


def grown(state: Path) -> list[bytes]:
    """The log of a state that may be in the making."""
    try:
        return log(state)
    except OneRecError:
        return []


def lines(*sessions: Session) -> list[bytes]:
    return [session_json(found) for found in sessions]


def forget(config: KafkaConfig, topic: str, partition: int, offset: int) -> None:
    """Deletes the records before `offset`, as retention does."""
    place = TopicPartition(config.named(topic), partition, offset)
    admin = topics.admin(config)
    for future in admin.delete_records([place]).values():
        future.result(90)


def command(name: str, config: KafkaConfig, state: Path, *more: str) -> subprocess.Popen[bytes]:
    words = [name, "--state", str(state), "--bootstrap", config.bootstrap, "--json"]
    for setting in (f'prefix="{config.prefix}"', f"partitions={config.partitions}", f"stall_seconds={config.stall_seconds}"):
        words += ["--set", f"kafka.{setting}"]
    return subprocess.Popen(
        [sys.executable, "-m", "onerec.cli", *words, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_sessions_come_once_in_the_order_of_their_ends_with_all_their_parts(
    config: KafkaConfig, worker: Worker, tmp_path: Path
) -> None:
    a, b, c, d = (session(user, minute) for user, minute in (("a", 3), ("b", 1), ("c", 2), ("d", 4)))
    worker.commit(0, [a], watermark=10)
    worker.commit(1, [b, d], watermark=10)
    worker.commit(1, [session("never", 5)], watermark=90, abort=True)
    worker.commit(2, [c], watermark=7)
    worker.end()
    feeder = fed(config, tmp_path / "state")
    assert log(tmp_path / "state") == lines(b, c, a, d)
    with Reader(tmp_path / "state") as reader:
        assert [found for _, found in reader.sessions()] == [b, c, a, d]
        assert reader.counters().sessions == reader.counters().high_quality == 4
        assert reader.watermark() == T0 + 7 * 60_000
    assert feeder.done.sessions == 4 and feeder.done.repeats == 0
    assert fed(config, tmp_path / "state").done.sessions == 0


def test_repeats_are_dropped_and_foreign_records_left_out_and_told_of(
    config: KafkaConfig, worker: Worker, tmp_path: Path
) -> None:
    first, second = session("a", 1), session("a", 3)
    worker.commit(0, [first], watermark=5)
    value, headers = session_message(first, 0, 1)
    elsewhere, _ = session_message(first, 2, 1)
    broken = value.replace(b'"labels"', b'"labours"').replace(b"[0,1]", b"[0,3]")
    worker.transaction([
        ("sessions", 0, b"a", value, headers), ("sessions", 0, b"a", value, headers),
        ("sessions", 0, None, b"no session", None), ("sessions", 0, None, None, None),
        ("sessions", 0, b"a", elsewhere, headers),
    ])
    worker.commit(0, [second], watermark=8)
    worker.transaction([("sessions", 0, b"a", broken, headers)])
    worker.end()
    said: list[str] = []
    feeder = fed(config, tmp_path / "state", said)
    assert log(tmp_path / "state") == lines(first, second)
    assert feeder.done.repeats == 2 and feeder.done.refused == 4 == len(said)
    assert all(f"topic {config.prefix}sessions, partition 0, offset" in text for text in said)


def test_a_hole_is_refused_with_the_number_of_sessions_and_skipped_on_demand(
    config: KafkaConfig, worker: Worker, tmp_path: Path
) -> None:
    kept = [session("a", minute) for minute in (1, 2)]
    worker.commit(0, kept, watermark=5)
    worker.progress[0].sessions = 7
    later = session("a", 20)
    worker.commit(0, [later], watermark=30)
    worker.end()
    with pytest.raises(Failure, match=r"partition 0, before offset \d+: 5 sessions \(positions 3 to 7\).*--skip-forgotten"):
        fed(config, tmp_path / "state")
    said: list[str] = []
    feeder = fed(config, tmp_path / "state", said, skip_forgotten=True)
    assert feeder.done.forgotten == 5 and len(said) == 1
    assert log(tmp_path / "state") == lines(*kept, later)
    assert fed(config, tmp_path / "state").done.forgotten == 0


def test_what_retention_took_is_counted_exactly(config: KafkaConfig, worker: Worker, tmp_path: Path) -> None:
    sessions = [session("a", minute) for minute in range(10)]
    worker.commit(0, sessions[:4], watermark=8)
    worker.end()
    fed(config, tmp_path / "state")
    worker.commit(0, sessions[4:9], watermark=20)
    worker.end()
    # Offsets 0-3 and a mark, then five more: all that was fed is forgotten, and nothing else.
    forget(config, "sessions", 0, 5)
    fed(config, tmp_path / "state")
    assert log(tmp_path / "state") == lines(*sessions[:9])
    worker.commit(0, sessions[9:], watermark=30)
    worker.end()
    forget(config, "sessions", 0, -1)
    with pytest.raises(Failure, match=r"1 sessions \(positions 10 to 10\)"):
        fed(config, tmp_path / "state")
    assert fed(config, tmp_path / "state", skip_forgotten=True).done.forgotten == 1
    with pytest.raises(Failure, match=r"10 sessions \(positions 1 to 10\)"):
        fed(config, tmp_path / "new")
    fresh = fed(config, tmp_path / "new", skip_forgotten=True)
    assert fresh.done.forgotten == 10 and log(tmp_path / "new") == []


def test_ranks_share_the_partitions_and_keep_to_them(config: KafkaConfig, worker: Worker, tmp_path: Path) -> None:
    for partition in range(3):
        worker.commit(partition, [session(f"u{partition}", minute) for minute in (1, 2)], watermark=10)
    worker.end()
    for rank in range(2):
        fed(config, tmp_path / f"rank{rank}", rank=rank, ranks=2)
    fed(config, tmp_path / "all")
    first, second = log(tmp_path / "rank0"), log(tmp_path / "rank1")
    assert len(first) == 4 and len(second) == 2
    assert sorted(first + second) == sorted(log(tmp_path / "all"))
    with pytest.raises(UserError, match=r"fed as rank 1 of 2, from 3 partitions; asked is rank 1 of 3"):
        Feeder(config, tmp_path / "rank1", rank=1, ranks=3)
    with pytest.raises(UserError, match="numbered from 0"):
        Feeder(config, tmp_path / "x", rank=2, ranks=2)
    with pytest.raises(UserError, match="no partition is left"):
        Feeder(config, tmp_path / "x", rank=3, ranks=4)


def test_a_state_of_another_use_is_left_alone(config: KafkaConfig, worker: Worker, tmp_path: Path) -> None:
    with Store(tmp_path / "state", worker.semantics) as store:
        store.append([session("a", 1)], {}, watermark=None)
    with pytest.raises(UserError, match="holds what replay or histories-replica wrote"):
        Feeder(config, tmp_path / "state")
    assert log(tmp_path / "state") == lines(session("a", 1))


def test_topics_missing_or_made_anew_are_refused(config: KafkaConfig, worker: Worker, tmp_path: Path) -> None:
    worker.commit(0, [session("a", 1)], watermark=5)
    worker.end()
    fed(config, tmp_path / "state")
    admin = topics.admin(config)
    for future in admin.delete_topics([config.named("sessions")]).values():
        future.result(90)
    with pytest.raises(UserError, match="sessions.*missing"):
        while True:  # a broker takes its time to forget a topic
            Feeder(config, tmp_path / "other").close()
            time.sleep(0.2)
    deadline = time.monotonic() + PATIENCE * 30
    while any(not state.there for state in topics.create(config, ["sessions"])):
        assert time.monotonic() < deadline
    with pytest.raises(UserError, match=r"sessions was deleted and made anew.*empty folder"):
        Feeder(config, tmp_path / "state")


def test_the_catalogue_comes_along_in_one_order_and_its_faults_are_told(
    config: KafkaConfig, worker: Worker, tmp_path: Path
) -> None:
    def item(number: int, *embedding: float) -> tuple[str, bytes]:
        name = f"i{number}"
        return name, orjson.dumps({
            "type": "item", "item_id": name, "ts": T0, "duration_ms": 9_000, "tags": ["t"], "author_id": None,
            "embedding": list(embedding) or [float(number), 1.0],
        })

    worker.catalogue([*(item(number) for number in range(7)), ("i99", b"no item"), ("i98", None), item(97, 1.0)])
    worker.end()
    said: list[str] = []
    feeder = fed(config, tmp_path / "state", said)
    assert feeder.done.items == 7 and feeder.done.refused == len(said) == 2
    assert "not a list of finite numbers of the catalogue's dimension" in " ".join(said)
    worker.catalogue([item(3, 9.0, 9.0), item(8)])
    again = fed(config, tmp_path / "state")
    assert again.done.items == 2
    with Reader(tmp_path / "state") as reader:
        found = [record for _, record in reader.items()]
        assert [record.item_id for record in found] == ["i0", "i6", "i1", "i4", "i2", "i5", "i3", "i8"]
        assert found[0] == ItemRecord(item_id="i0", ts=T0, duration_ms=9_000, tags=["t"], embedding=[0.0, 1.0])
        assert reader.progress().dimension == 2


def test_a_partition_whose_worker_stands_still_holds_up_the_others_for_a_while_only(
    config: KafkaConfig, worker: Worker, tmp_path: Path
) -> None:
    worker.commit(0, [session("a", 9)], watermark=20)
    worker.commit(1, [session("b", 8)], watermark=20)
    worker.commit(2, [], watermark=2)
    with Feeder(config, tmp_path / "state") as feeder:
        begun = time.monotonic()
        while not feeder.done.sessions:
            feeder.step()
            assert time.monotonic() < begun + PATIENCE * 20
        assert time.monotonic() > begun + config.stall_seconds - 1
        status = feeder.status()
        assert status["left_out"] == [2] and status["watermark"] == T0 + 2 * 60_000
        worker.commit(2, [session("c", 3)], watermark=20)
        while feeder.done.sessions < 3:
            feeder.step()
            assert time.monotonic() < begun + PATIENCE * 30
        while feeder.status()["watermark"] != T0 + 20 * 60_000:
            feeder.step()
            assert time.monotonic() < begun + PATIENCE * 30
        while feeder.status()["lag_ms"] != 0:
            feeder.step()
            assert time.monotonic() < begun + PATIENCE * 30
    assert log(tmp_path / "state") == lines(session("b", 8), session("a", 9), session("c", 3))


def test_what_waits_for_other_partitions_is_bounded(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cluster(partitions=3, stall_seconds=60)
    sessions = [[session(f"u{p}-{n}", n) for n in range(p, 300, p + 1)] for p in range(3)]
    with Worker(config) as worker:
        for partition, found in enumerate(sessions):
            worker.commit(partition, found, watermark=1_000)
        worker.end()
    monkeypatch.setattr("streaming.kafka.feeder.HOLD_BYTES", 20_000)
    monkeypatch.setattr("streaming.kafka.feeder.READ", 50)
    held: list[int] = []
    hold = Tail.hold

    def watched(tail: Tail, partitions: set[int]) -> None:
        held.extend(partitions)
        hold(tail, partitions)

    monkeypatch.setattr(Tail, "hold", watched)
    fed(config, tmp_path / "state")
    wanted = sorted((found.end, found.session_id) for part in sessions for found in part)
    with Reader(tmp_path / "state") as reader:
        assert [(found.end, found.session_id) for _, found in reader.sessions()] == wanted
    assert held


def test_it_follows_until_stopped_and_says_what_it_did(config: KafkaConfig, worker: Worker, tmp_path: Path) -> None:
    running = command("feed", config, tmp_path / "state")
    try:
        worker.commit(0, [session("a", 1)], watermark=5)
        for partition in (1, 2):
            worker.commit(partition, [], watermark=5)
        deadline = time.monotonic() + PATIENCE * 30
        while not grown(tmp_path / "state"):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        printed, complaints = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0, complaints
    summary = orjson.loads(printed)
    assert summary["sessions"] == 1 and summary["ended"] is False and summary["lag_records"] == 0
    assert summary["run"] == {"sessions": 1, "repeats": 0, "refused": 0, "forgotten": 0, "items": 0}


@pytest.mark.parametrize("name", ["feed", "histories-replica"])
def test_before_the_first_worker_it_waits_and_can_be_stopped(config: KafkaConfig, tmp_path: Path, name: str) -> None:
    running = command(name, config, tmp_path / "state")
    try:
        assert running.stderr is not None
        assert b"waiting for the first worker" in running.stderr.readline()
        running.send_signal(signal.SIGTERM)
        printed, complaints = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0 and printed == b"" and b"stopped before the first worker" in complaints
    assert not (tmp_path / "state").exists()


@pytest.mark.slow
def test_killed_anywhere_the_log_is_the_same(config: KafkaConfig, worker: Worker, tmp_path: Path) -> None:
    rng = random.Random(5)

    def work() -> None:
        for minute in range(0, 1_200, 4):
            for partition in rng.sample(range(3), 3):
                found = sorted(
                    (session(f"u{partition}-{n}", minute + rng.random() * 4) for n in range(rng.randrange(12))),
                    key=lambda one: (one.end, one.session_id),
                )
                worker.commit(partition, found, watermark=minute + 6, abort=rng.random() < 0.05)
                if rng.random() < 0.05:
                    worker.commit(partition, found, watermark=minute + 6, abort=True)
        worker.end()

    writing = threading.Thread(target=work)
    writing.start()
    kills = 0
    while writing.is_alive():
        running = command("feed", config, tmp_path / "killed")
        time.sleep(rng.uniform(1.0, 3.0))
        running.kill()
        running.communicate()
        kills += 1
    writing.join()
    running = command("feed", config, tmp_path / "killed", "--until-end")
    printed, complaints = running.communicate(timeout=180)
    assert running.returncode == 0, complaints
    fed(config, tmp_path / "whole")
    whole = log(tmp_path / "whole")
    assert len(whole) == sum(found.sessions for found in worker.progress.values()) > 1_000
    assert log(tmp_path / "killed") == whole and kills > 1
    assert orjson.loads(printed)["watermark"] == min(found.watermark or 0 for found in worker.progress.values())
    with Reader(tmp_path / "whole") as one, Reader(tmp_path / "killed") as other:
        assert one.progress() == other.progress()
