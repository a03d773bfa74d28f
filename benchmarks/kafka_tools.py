"""What the Kafka benchmarks share: a log in order of time, a broker, topics filled in advance, processes and their memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import orjson
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from onerec.config import load_config
from streaming.kafka.settings import KafkaConfig, consumer

ROOT: Final = Path(__file__).resolve().parents[1]
EVENTS_PER_USER_DAY: Final = 21


def ordered_log(path: Path, events: int, *, days: int = 10) -> int:
    """A simulated log of about so many events in order of time, without repeats or late ones; returns how many.

    Only such a log gives the same sessions in programs that know neither repeats nor watermarks.
    """
    users = max(100, events // (EVENTS_PER_USER_DAY * days))
    raw = path.with_suffix(".raw")
    onerec("simulate", "--out", str(raw), "--users", str(users), "--items", "5000", "--days", str(days), "--seed", "1",
           "--no-embeddings", "--late-share", "0", "--duplicate-share", "0", "--progress-share", "0", "--json")
    lines = raw.read_bytes().splitlines()
    lines.sort(key=lambda line: orjson.loads(line)["ts"])
    path.write_bytes(b"\n".join(lines) + b"\n")
    raw.unlink()
    return len(lines)


def lines_of(log: Path) -> int:
    """Lines of a file."""
    with log.open("rb") as file:
        return sum(1 for _ in file)


def onerec(*arguments: str, timeout: float = 900) -> dict[str, Any]:
    """Runs one command to its end; its last line of output as JSON ({} if it is none). Raises where it fails."""
    done = subprocess.run([sys.executable, "-m", "onerec.cli", *arguments], capture_output=True, text=True, timeout=timeout,
                          cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"onerec {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return _last_json(done.stdout)


def _last_json(text: str) -> dict[str, Any]:
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return {}


class Process:
    """A process of its own, its output in a file; killed on leaving if it still runs."""

    def __init__(self, log: Path, command: list[str], *, core: int | None = None) -> None:
        self.log = log
        self.began = time.monotonic()
        self._file = log.open("wb")
        if core is not None:
            command = ["taskset", "-c", str(core), *command]
        self._process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.STDOUT, cwd=ROOT)
        self.pid = self._process.pid

    @classmethod
    def onerec(cls, log: Path, *arguments: str, core: int | None = None) -> Process:
        """One of the project's commands."""
        return cls(log, [sys.executable, "-m", "onerec.cli", *arguments], core=core)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()
        self._file.close()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def text(self) -> str:
        """All it has written."""
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def stop(self, seconds: float = 30) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        if self.running:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def finish(self, seconds: float) -> dict[str, Any]:
        """Waits for the end and returns the last JSON line. Raises with the output's end where it fails or takes too long."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end after {seconds} s:\n{self.text()[-2000:]}") from None
        if code:
            raise RuntimeError(f"exit {code}:\n{self.text()[-2000:]}")
        return _last_json(self.text())

    def resident(self) -> float:
        """Resident memory of the process, MiB; 0 when it has ended."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        except OSError:
            return 0.0

    def cpu(self) -> float:
        """Processor seconds used so far; 0 when it has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def broker(folder: Path, bootstrap: str | None) -> Iterator[tuple[str, Process | None]]:
    """The address of a broker: the one given, or one of our own for as long as the context lasts, with its process."""
    if bootstrap:
        yield bootstrap, None
        return
    port = free_port()
    with Process.onerec(folder / "broker.log", "kafka", "up", "--dir", str(folder / "kafka"), "--port", str(port),
                        "--heap", "1g") as process:
        wait_for(lambda: "ready" in process.text() or not process.running, 120, "the broker")
        if not process.running:
            raise RuntimeError(process.text())
        yield f"127.0.0.1:{port}", process


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [below for child in (task / "children").read_text().split() for below in family(int(child))]
    return found


def pin(pids: Iterable[int], cores: set[int]) -> None:
    """Keeps all threads of processes to some cores."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores)


def wait_for(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.05) -> None:
    """Polls until `condition()` is true. Raises RuntimeError naming `what` after so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(f"{what}: not there after {seconds} s")
        time.sleep(every)


class Cluster:
    """One log on the broker: its prefix, and the options that every command needs to reach it."""

    def __init__(self, bootstrap: str, prefix: str, partitions: int, settings: Iterable[str] = ()) -> None:
        self.bootstrap = bootstrap
        self.partitions = partitions
        self.settings = [f"kafka.prefix={prefix}", f"kafka.partitions={partitions}", *settings]
        self.options = ["--bootstrap", bootstrap, *(part for value in self.settings for part in ("--set", value))]

    def create(self) -> Cluster:
        """Makes the topics."""
        onerec("topics", "--create", *self.options)
        return self

    @property
    def config(self) -> KafkaConfig:
        """The section `[kafka]` in force."""
        return load_config(None, self.settings, self.bootstrap).kafka

    def consumer(self, **settings: Any) -> Consumer:
        """A reader of committed records that belongs to no group's business."""
        return Consumer(consumer(self.config, group_id=self.config.named("bench"), **settings))

    def ends(self, topic: str) -> dict[int, int]:
        """Partition → offset of its end, transaction markers counted."""
        name = self.config.named(topic)
        reader = self.consumer()
        try:
            return {p: reader.get_watermark_offsets(TopicPartition(name, p), timeout=10)[1] for p in range(self.partitions)}
        finally:
            reader.close()

    def read(self, topic: str, handle: Callable[[Any], None], *, partitions: int | None = None) -> None:
        """Calls `handle(message)` for every committed message there is now."""
        name, reader = self.config.named(topic), self.consumer(enable_partition_eof=True)
        left = set(range(partitions or self.partitions))
        reader.assign([TopicPartition(name, p, 0) for p in left])
        try:
            while left:
                for message in reader.consume(500, 0.2):
                    if message.error():
                        left.discard(message.partition())
                    else:
                        handle(message)
        finally:
            reader.close()

    def copy_events(self, other: Cluster) -> int:
        """Copies the `events` of another log, so that one ingest serves many measurements; returns the messages."""
        name = self.config.named("events")
        producer = Producer({"bootstrap.servers": self.bootstrap, "enable.idempotence": True, "compression.type": "lz4",
                             "message.max.bytes": 2 << 20, "linger.ms": 20})
        count = 0

        def copy(message: Any) -> None:
            nonlocal count
            producer.produce(name, message.value(), None, message.partition(), timestamp=message.timestamp()[1],
                             headers=message.headers())
            producer.poll(0)
            count += 1

        other.read("events", copy)
        producer.flush(60)
        return count


def create_plain(bootstrap: str, partitions: int, *names: str) -> None:
    """Plain topics, for the peers."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.create_topics([NewTopic(name, partitions, 1) for name in names]).values():
        future.result()


def preload(bootstrap: str, topic: str, log: Path, partitions: int, events: int) -> int:
    """Puts the first `events` lines into a topic, one a message, keyed by user; returns how many."""
    producer = Producer({"bootstrap.servers": bootstrap, "compression.type": "lz4", "linger.ms": 50,
                         "queue.buffering.max.messages": 500_000})
    count = 0
    with log.open("rb") as file:
        for line in file:
            key = orjson.loads(line)["user_id"].encode()
            while True:
                try:
                    producer.produce(topic, line.rstrip(), key, zlib.crc32(key) % partitions)
                    break
                except BufferError:
                    producer.poll(0.1)
            producer.poll(0)
            count += 1
            if count == events:
                break
    producer.flush(60)
    return count


class Sampler(threading.Thread):
    """Calls `sample()` every so many seconds and keeps (seconds since the start, value)."""

    def __init__(self, sample: Callable[[], Any], every: float) -> None:
        super().__init__(daemon=True)
        self.began = time.monotonic()
        self.values: list[tuple[float, Any]] = []
        self._sample, self._every, self._over = sample, every, threading.Event()

    def run(self) -> None:
        """Until `end`."""
        while not self._over.wait(self._every):
            with contextlib.suppress(Exception):
                self.values.append((round(time.monotonic() - self.began, 2), self._sample()))

    def end(self) -> list[tuple[float, Any]]:
        """Stops it; what it saw."""
        self._over.set()
        self.join()
        return self.values


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, those that vanish meanwhile left out."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
