"""Preference pairs through Kafka: each sampled session once, whoever is killed or joins, and once in the trainer's log."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from confluent_kafka import Producer
from feeding import SEMANTICS, Worker, session
from patience import PATIENCE
from test_feed import fed
from test_feed_train import catalogue

from onerec.config import load_config
from onerec.errors import UserError
from streaming.kafka import settings, topics
from streaming.kafka.pairs import RUN_HEADER, TOPIC, SampleStream
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Tail
from streaming.kafka.topics import topic_ids
from trainer import presets
from trainer.checkpoint import latest_checkpoint
from trainer.kafka_sampler import PairCopy, Seat, run_id
from trainer.loop import train
from trainer.pairs import Drop, PairReader, encode_record, is_sampled, pairs_path

RATIO = 0.5
SETTINGS = [
    "train.preset=tiny", "train.batch_windows=8", "train.threads=1", "train.score_share=0", "train.precision=fp32",
    "catalogue.codes=8", "catalogue.levels=2", f"preference.ratio={RATIO}", "preference.responses=8",
    "preference.min_margin=0.0",
]


def drop(name: str, number: int = 0) -> Drop:
    return Drop(number=number, session_id=name, sequence=1, snapshot_step=1, reason="tie")


def in_topic(config: KafkaConfig) -> list[str]:
    """Session ids of the committed records."""
    tail = Tail(config, TOPIC, topic_ids(config, [TOPIC])[TOPIC], {0: 0})
    names: list[str] = []
    try:
        while not tail.complete():
            names += [(message.key() or b"").decode() for message in tail.read(1000, 0.2)]
    finally:
        tail.close()
    return names


def wait(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + PATIENCE * seconds
    while not holds():
        assert time.monotonic() < deadline


def read(run: Path) -> list[str]:
    with PairReader(pairs_path(run)) as reader:
        return [record.session_id for record in reader.read(0, 10_000)]


@pytest.mark.slow
def test_a_killed_sampler_and_copier_lose_no_session_and_double_none(
    cluster: Callable[..., KafkaConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = msgspec.structs.replace(
        presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, experts=2
    )
    monkeypatch.setitem(presets.PRESETS, "tiny", small)
    config, state, run = cluster(partitions=2), tmp_path / "state", tmp_path / "run"
    sessions = [session(f"u{n}", n / 10) for n in range(240)]
    with Worker(config, SEMANTICS) as worker:
        worker.catalogue(catalogue())
        for partition in range(2):
            worker.commit(partition, sessions[partition::2], watermark=60)
        worker.end()
    fed(config, state)
    train(state, run, load_config(None, SETTINGS))
    watermark = latest_checkpoint(run).watermark
    assert watermark is not None
    wanted = {s.session_id for s in sessions if s.end <= watermark and is_sampled(s.session_id, RATIO)}
    assert len(wanted) > 80
    words = [part for setting in (*SETTINGS, f'kafka.prefix="{config.prefix}"', "kafka.partitions=2")
             for part in ("--set", setting)]
    words = ["sampler", "--state", str(state), "--run", str(run), "--bootstrap", config.bootstrap, "--json", *words]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "onerec.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    process = start()
    try:
        with PairCopy(config, run, say=print) as copy:
            wait(lambda: copy.step() > 0)
        time.sleep(random.Random(2).random() * 0.2)
        process.kill()
        process.wait()
        before = len(read(run))
        assert 0 < before < len(wanted), "killed in the middle of it"
        process = start()
        with PairCopy(config, run, say=print) as copy:

            def copied() -> bool:
                copy.step()
                return bool(copy.status()["records"] == len(wanted))

            wait(copied)
            process.send_signal(signal.SIGTERM)
            output, error = process.communicate(timeout=60)
            while copy.step():
                pass
            assert copy.done.repeats == copy.done.foreign == copy.done.refused == 0
    finally:
        process.kill()
    assert process.returncode == 0, error.decode()
    with PairReader(pairs_path(run)) as reader:
        assert {r.session_id: r.ended for r in reader.read(0, 10_000)} == {s.session_id: s.end for s in sessions
                                                                           if s.session_id in wanted}
    found = read(run)
    assert len(found) == len(set(found)) and set(found) == wanted
    assert sorted(in_topic(config)) == sorted(found)


def test_members_that_join_take_over_what_is_not_written(cluster: Callable[..., KafkaConfig]) -> None:
    config = cluster(partitions=2)
    with Worker(config, SEMANTICS) as worker:
        for partition in range(2):
            worker.commit(partition, [session(f"u{partition}-{n}", n) for n in range(20)], watermark=30)
    until = 1 << 60

    def member(name: str) -> SampleStream:
        return SampleStream(config, "run", name, lambda session_id: True, hold=1_000, say=print)

    first = member("0")
    try:
        def read_all() -> bool:
            first.read(0.1)
            return first.due(until) == 40

        wait(read_all)
        ahead = first.next(until, 10)
        assert [s.end for s in ahead] == sorted(s.end for s in ahead) and {s.partition for s in ahead} == {0, 1}
        assert first.commit(ahead, [encode_record(drop(s.session_id)) for s in ahead])
        second = member("1")
        try:
            def shared() -> bool:
                for one in (first, second):
                    one.read(0.05)
                return len(first.partitions) == len(second.partitions) == 1 and first.due(until) == second.due(until) == 15

            wait(shared)
            for one in (first, second):
                while rest := one.next(until, 4):
                    assert one.commit(rest, [encode_record(drop(s.session_id)) for s in rest])
        finally:
            second.close()
    finally:
        first.close()
    names = in_topic(config)
    assert len(names) == 40 and set(names) == {session(f"u{p}-{n}", n).session_id for p in range(2) for n in range(20)}


def test_a_copy_leaves_out_other_runs_repeats_and_rubbish_and_knows_a_new_topic(
    cluster: Callable[..., KafkaConfig], tmp_path: Path
) -> None:
    config, run = cluster(partitions=1), tmp_path / "run"
    own = run_id(run).encode()
    producer = Producer(settings.producer(config))

    def put(value: bytes, header: bytes = own) -> None:
        producer.produce(config.named(TOPIC), value, partition=0, headers=[(RUN_HEADER, header)])

    put(encode_record(drop("a")))
    put(encode_record(drop("b")), b"another")
    put(encode_record(drop("a")))
    put(b"rubbish")
    put(encode_record(drop("c")))
    producer.flush()
    said: list[str] = []
    with PairCopy(config, run, say=said.append) as copy:
        while not copy.finished():
            copy.step()
        done = copy.done
        assert (done.records, done.repeats, done.foreign, done.refused) == (2, 1, 1, 1)
        assert copy.status()["records"] == 2
    assert read(run) == ["a", "c"] and len(said) == 1 and "offset 3: left out, no preference pair" in said[0]
    put(encode_record(drop("c")))
    put(encode_record(drop("d")))
    producer.flush()
    with PairCopy(config, run, say=said.append) as copy:
        while not copy.finished():
            copy.step()
        assert (copy.done.records, copy.done.repeats) == (1, 1)
    assert read(run) == ["a", "c", "d"]
    admin = topics.admin(config)
    admin.delete_topics([config.named(TOPIC)])[config.named(TOPIC)].result(30)
    wait(lambda: not all(state.faults for state in topics.create(config, [TOPIC])))
    with pytest.raises(UserError, match="was deleted and made anew"):
        PairCopy(config, run, say=said.append)


def test_seats_are_taken_in_turn_and_freed(tmp_path: Path) -> None:
    name = run_id(tmp_path)
    assert name == run_id(tmp_path) and len(name) == 12 and name != run_id(tmp_path / "other")
    with Seat(tmp_path) as first:
        with Seat(tmp_path) as second:
            assert (first.number, second.number) == (0, 1)
        with Seat(tmp_path) as again:
            assert again.number == 1
    with Seat(tmp_path) as last:
        assert last.number == 0
