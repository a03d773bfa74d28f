"""The sample server on Kafka: `sessions` in, `preference-pairs` out; and that topic copied into a run's pair log.

Several samplers may share a run. RUN/pairs/id tells its records from those of other runs in the same topic.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from onerec.closing import Closing
from onerec.config import Config
from onerec.errors import Failure, UserError
from onerec.files import sync_path
from streaming.kafka.pairs import RUN_HEADER, TOPIC, Sampled, SampleStream
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Delay, Tail
from streaming.kafka.topics import require, topic_ids
from trainer.checkpoint import Checkpoint
from trainer.pairs import SCAN, PairIndex, PairLog, PairReader, Record, decode_record, encode_record, is_sampled, pairs_path
from trainer.sampler import POLL_SECONDS, Sampler, Say, Snapshots, Waiting, Wrote, check_sampling
from trainer.sampler_stats import Meter, Stats, stats_path

HOLD_QUEUES = 4
"""Sampled sessions read ahead of the trainer, in queues; beyond, reading waits."""
READ = 1_000
MEMBERS = 64


def run_id(run_dir: Path) -> str:
    """The name of a run in Kafka, 12 hexadecimal digits, made by whoever asks first; a folder made anew has another."""
    path = run_dir / "pairs" / "id"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            staging = path.with_name(f".id-{os.getpid()}-{secrets.token_hex(4)}")
            staging.write_text(secrets.token_hex(6))
            sync_path(staging)
            try:
                os.link(staging, path)
            except FileExistsError:
                pass
            staging.unlink()
            sync_path(path.parent)
        return path.read_text()
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}; mend permissions or disk") from error


class Seat(Closing):
    """The lowest number that no other living sampler of the run has: a killed one's is free again, and its successor's."""

    def __init__(self, run_dir: Path) -> None:
        for number in range(MEMBERS):
            file = os.open(run_dir / "pairs" / f"sampler-{number}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            self.number, self._file = number, file
            return
        raise UserError(f"{run_dir}: {MEMBERS} samplers are at work already; that is the most that one run has")

    def close(self) -> None:
        """Frees the number."""
        os.close(self._file)


class KafkaSource(Closing):
    """Sessions of the topic whose end the checkpoint has learnt; records into the topic, with the group's offsets."""

    def __init__(
        self, config: Config, run_dir: Path, seat: Seat, *, queue: int, say: Say, stopped: Callable[[], bool]
    ) -> None:
        self.index = PairIndex()
        self._reader = PairReader(pairs_path(run_dir))
        ratio = config.preference.ratio
        self._stream = SampleStream(
            config.kafka, run_id(run_dir), str(seat.number), lambda name: is_sampled(name, ratio), hold=HOLD_QUEUES * queue,
            say=say, stopped=stopped,
        )
        self._until: int | None = None

    def take(self, checkpoint: Checkpoint) -> None:
        """Reads on; those are due that ended before the checkpoint's watermark, so that M_t has learnt them."""
        self._until = checkpoint.watermark
        self._stream.read(0.05)
        while records := self._reader.read(self.index.last, SCAN):
            for record in records:
                self.index.note(record)

    def due(self) -> int:
        """Of the partitions that this sampler has."""
        return self._stream.due(self._until)

    def next(self, count: int) -> list[Waiting]:
        """By event time."""
        return [Waiting(s.session_id, s.place, s.history, s.end) for s in self._next(count)]

    def _next(self, count: int) -> list[Sampled]:
        return self._stream.next(self._until, count)

    def put(self, records: list[Record]) -> bool:
        """One transaction; False where the group has moved on, and others do these sessions."""
        return self._stream.commit(self._next(len(records)), [encode_record(record) for record in records])

    def unread(self, checkpoint: Checkpoint) -> int:
        """Pairs of the log that the trainer has not taken, and what of the topic has not come to the log."""
        # Behind the last record lies the mark of its transaction.
        coming = max(0, self._stream.written() - self.index.offsets.get(0, -2) - 2)
        return len(self.index.pairs_between(checkpoint.pairs, self.index.last)) + coming

    def close(self) -> None:
        """Leaves the group."""
        self._stream.close()
        self._reader.close()


def sample_from_kafka(
    state_dir: Path,
    run_dir: Path,
    config: Config,
    *,
    queue: int,
    threads: int = 1,
    stopped: Callable[[], bool] = lambda: False,
    say: Say = lambda text: None,
    progress: Callable[[Stats], None] = lambda stats: None,
    wrote: Wrote = lambda records: None,
) -> Stats:
    """Make pairs for a run until stopped, beside others that do; `state_dir` is the trainer's, for its catalogue.

    Raises as `trainer.sampler.sample`, and UserError where topics are missing.
    """
    torch.set_num_threads(threads)
    check_sampling(config, run_dir)
    run_id(run_dir)
    with Seat(run_dir) as seat, KafkaSource(config, run_dir, seat, queue=queue, say=say, stopped=stopped) as source:
        meter = Meter(stats_path(run_dir, seat.number), source.index)
        sampler = Sampler(source, Snapshots(state_dir, run_dir, config, say), meter, queue=queue, wrote=wrote)
        return sampler.run(True, stopped, say, progress)


class Copied(msgspec.Struct, kw_only=True):
    """What a copier has done in this run; `repeats`: sessions that the log had already; `foreign`: records of other runs."""

    records: int = 0
    repeats: int = 0
    foreign: int = 0
    refused: int = 0


class PairCopy(Closing):
    """Copies this run's records of the topic `preference-pairs` into RUN/pairs/pairs.log, each session once.

    Every record carries the offset it came from, so that the log itself says where to go on. Raises UserError where the
    topic is missing or was made anew, Failure where the disk refuses.
    """

    def __init__(self, config: KafkaConfig, run_dir: Path, *, say: Say) -> None:
        require(config, [TOPIC])
        self.done = Copied()
        self.delay = Delay()
        self._say, self._run = say, run_id(run_dir).encode()
        topic = topic_ids(config, [TOPIC])[TOPIC]
        self._log = PairLog(pairs_path(run_dir))
        try:
            self._same_topic(run_dir, config.named(TOPIC), topic)
            place = self._log.offsets.get(0)
            self._tail = Tail(config, TOPIC, topic, {0: None if place is None else place + 1})
        except BaseException:
            self._log.close()
            raise

    def _same_topic(self, run_dir: Path, name: str, topic: str) -> None:
        path = run_dir / "pairs" / "topic"
        if not path.exists() or not self._log.last:
            path.write_text(topic)
            sync_path(path)
        elif path.read_text() != topic:
            raise UserError(
                f"topic {name} was deleted and made anew since {run_dir} read from it, so its offsets mean something else "
                "now; give a new --run, or the kafka.prefix whose topics it was read from"
            )

    def step(self) -> int:
        """Copies what is there, after a moment where nothing is; how many records were read."""
        messages = self._tail.read(READ, POLL_SECONDS)
        records: list[Record] = []
        fresh: set[str] = set()
        for message in messages:
            if dict(message.headers() or []).get(RUN_HEADER) != self._run:
                self.done.foreign += 1
                continue
            try:
                record = decode_record(message.value() or b"")
            except msgspec.DecodeError as error:
                self.done.refused += 1
                self._say(f"topic {self._tail.topic}, offset {message.offset()}: left out, no preference pair ({error})")
                continue
            if record.session_id in self._log.session_ids or record.session_id in fresh:
                self.done.repeats += 1
                continue
            fresh.add(record.session_id)
            records.append(msgspec.structs.replace(record, source=(0, message.offset())))
        if records:
            self._log.append(records)
            self.done.records += len(records)
        if messages:
            self.delay.stored(messages[0].timestamp()[1], messages[-1].timestamp()[1])
        return len(messages)

    def finished(self) -> bool:
        """Whether nothing is left to read now."""
        return self._tail.complete()

    def lags(self) -> dict[int, int]:
        """Records between what is stored and the topic's end, by partition."""
        return self._tail.lags()

    def status(self) -> dict[str, Any]:
        """Records and pairs in the log, and how far it is behind the topic."""
        behind = self._tail.behind()
        return {
            "records": self._log.last,
            "pairs": len(self._log.pairs),
            "lag_records": behind,
            "lag_ms": self.delay.lag_ms(at_end=behind == 0),
            "delay_p95_ms": self.delay.p95_ms(),
        }

    def close(self) -> None:
        """Lets go of topic and log."""
        self._tail.close()
        self._log.close()
