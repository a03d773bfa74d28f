"""Events a second through Kafka: `produce`, `ingest`, `stream` with one and two workers, peers, and the bare machine."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path
from typing import Any

import orjson
from confluent_kafka import Consumer, TopicPartition
from rich.console import Console
from rich.table import Table

from benchmarks.kafka_tools import (
    Cluster,
    Process,
    create_plain,
    lines_of,
    onerec,
    ordered_log,
    pin,
    preload,
)
from streaming.kafka.settings import consumer
from streaming.kafka.wire import END, Progress, decode_progress

PEER_PACKAGES = [
    "faust-streaming==0.15.3", "quixstreams>=3.28,<4", "rocksdict==0.3.29", "uvloop", "cramjam", "orjson", "msgspec",
]
PEERS = {
    "Faust table, default": ("faust_table", []),
    "Faust table, tuned": ("faust_table", ["--tuned"]),
    "Quix Streams, default": ("quix", []),
    "Quix Streams, tuned": ("quix", ["--tuned"]),
    "Quix Streams, exactly once": ("quix", ["--tuned", "--exactly-once"]),
}
WINDOW = (0.3, 0.9)
"""Share of the events between which one and two workers are compared: both have started by then, neither is done."""

Curve = list[tuple[float, int]]


class Watch(threading.Thread):
    """Reads `progress` as it is committed: how many events are in committed sessions and histories at what time."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.curve: Curve = []
        self._cluster = cluster
        self._over = threading.Event()

    def run(self) -> None:
        """Until `end`."""
        topic = self._cluster.config.named("progress")
        reader = Consumer(consumer(self._cluster.config, group_id=self._cluster.config.named("bench"), fetch_wait_max_ms=20))
        reader.assign([TopicPartition(topic, 0, 0)])
        found: dict[int, Progress] = {}
        while not self._over.is_set():
            messages = reader.consume(200, 0.05)
            now = time.monotonic()
            for message in messages:
                if not message.error() and (message.key() or b"").startswith(b"partition:"):
                    progress = decode_progress(message.value() or b"", "progress")
                    found[progress.partition] = progress
            if messages:
                self.curve.append((now, sum(progress.counters.events for progress in found.values())))
        reader.close()

    def end(self) -> Curve:
        """Stops it; (time, events committed by then)."""
        self._over.set()
        self.join()
        return self.curve


def rate(curve: Curve, low: float = 0.0, high: float = 1.0) -> float:
    """Events a second between the first commit that passes `low` of all events and the first that passes `high`."""
    total = curve[-1][1]
    first = next(point for point in curve if point[1] > low * total)
    last = next(point for point in curve if point[1] >= high * total)
    return (last[1] - first[1]) / max(1e-9, last[0] - first[0])


def bare(cluster: Cluster, state: Path, events: int) -> dict[str, Any]:
    """Consumes `events`, parses every line and puts its bytes into a WriteBatch per 5,000."""
    from rocksdict import Options, Rdict, WriteBatch

    topic = cluster.config.named("events")
    reader = Consumer(consumer(cluster.config, group_id=cluster.config.named("bare")))
    reader.assign([TopicPartition(topic, p, 0) for p in range(cluster.partitions)])
    db = Rdict(str(state), Options(raw_mode=True))
    batch, count, began = WriteBatch(raw_mode=True), 0, 0.0
    while count < events:
        for message in reader.consume(50, 0.1):
            began = began or time.monotonic()
            for line in (message.value() or b"").split(b"\n"):
                event = orjson.loads(line)
                if "user_id" in event:
                    batch.put(b"%s:%d" % (event["user_id"].encode(), count), line)
                    count += 1
        if batch.len() >= 5_000:
            db.write(batch)
            batch = WriteBatch(raw_mode=True)
    db.write(batch)
    seconds = time.monotonic() - began
    db.close()
    return {"events": count, "rate": count / seconds, "cpu": time.process_time()}


def ingest(cluster: Cluster, folder: Path, events: int) -> dict[str, Any]:
    """One `ingest` over what is in the raw topics, to the end markers; its pace by the times of the records that it wrote."""
    began = time.monotonic()
    with Process.onerec(folder / "ingest.log", "ingest", *cluster.options, "--until-end", "--json") as process:
        used = 0.0
        while process.running and time.monotonic() - began < 600:
            used = max(used, process.cpu())
            time.sleep(0.05)
        summary = process.finish(1)
    wall = time.monotonic() - began
    written: dict[int, int] = {}

    def count(message: Any) -> None:
        at = message.timestamp()[1]
        written[at] = written.get(at, 0) + (0 if message.value() == END else message.value().count(b"\n") + 1)

    cluster.read("events", count)
    # The records of a transaction carry the time of its beginning: what the last one holds took time after it, as much as the
    # first one took before it.
    first, last = min(written), max(written)
    pace = (events - written[first]) / ((last - first) / 1000) if last > first else events / wall
    return {"rate": pace, "wall_rate": events / wall, "per_cpu_second": events / used, "summary": summary}


def stream(cluster: Cluster, folder: Path, engine: str, workers: int, *, one_core: bool = False) -> dict[str, Any]:
    """`onerec stream` over what is in `events`, to the end markers: rates, processor seconds, memory."""
    watch = Watch(cluster)
    watch.start()
    states = [folder / f"state-{engine}-{number}" for number in range(workers)]
    began = time.monotonic()
    processes = [
        Process.onerec(folder / f"stream-{engine}-{number}.log", "stream", "--state", str(state), "--engine", engine,
                       *cluster.options, "--until-end", "--json", core=0 if one_core else None)
        for number, state in enumerate(states)
    ]
    used: dict[int, float] = {}
    peak = 0.0
    try:
        while any(process.running for process in processes):
            for process in processes:
                used[process.pid] = max(used.get(process.pid, 0.0), process.cpu())
                peak = max(peak, process.resident())
            time.sleep(0.1)
            if time.monotonic() - began > 900:
                raise RuntimeError("stream did not end:\n" + "\n".join(process.text()[-1000:] for process in processes))
        for process in processes:
            process.finish(1)
    finally:
        for process in processes:
            process.stop()
        curve = watch.end()
    for state in states:
        shutil.rmtree(state, ignore_errors=True)
    return {
        "rate": rate(curve), "inner_rate": rate(curve, *WINDOW), "events": curve[-1][1], "cpu": sum(used.values()),
        "per_cpu_second": curve[-1][1] / sum(used.values()), "wall_rate": curve[-1][1] / (curve[-1][0] - began),
        "peak_mb": round(peak),
    }


def sessions_of(cluster: Cluster) -> dict[str, bytes]:
    """Session id → its JSON without the position."""
    found: dict[str, bytes] = {}

    def keep(message: Any) -> None:
        fields = orjson.loads(message.value())
        del fields["position"]
        if fields["session_id"] in found:
            raise RuntimeError(f"session {fields['session_id']} stands twice in {cluster.config.named('sessions')}")
        found[fields["session_id"]] = orjson.dumps(fields)

    cluster.read("sessions", keep)
    return found


def peer_sessions(bootstrap: str, topic: str, partitions: int) -> dict[str, bytes]:
    """Session id → JSON of a peer's topic."""
    reader = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench", "enable.partition.eof": True,
                       "isolation.level": "read_committed", "enable.auto.commit": False})
    reader.assign([TopicPartition(topic, p, 0) for p in range(partitions)])
    left, found = set(range(partitions)), dict[str, bytes]()
    while left:
        for message in reader.consume(500, 0.2):
            if message.error():
                left.discard(message.partition())
            else:
                value = message.value() or b""
                found[orjson.loads(value)["session_id"]] = value
    reader.close()
    return found


def peers_python(given: Path | None) -> Path:
    """The interpreter that has the peers' libraries: the one given, else a virtual environment in the cache."""
    if given:
        return given
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "onerec" / "peers"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)
        (home / "complete").touch()
    return python


def peer(kind: str, log: Path, options: argparse.Namespace, folder: Path, bootstrap: str, tag: str) -> dict[str, Any]:
    """One peer over the first events of the log; raises where a session of its differs from the embedded replay's."""
    module, flags = PEERS[kind]
    events = options.faust_events if module == "faust_table" else options.quix_events
    topic, out, state = f"{tag}.raw", f"{tag}.out", folder / tag
    create_plain(bootstrap, options.partitions, topic, out)
    events = preload(bootstrap, topic, log, options.partitions, events)
    command = [str(peers_python(options.peers_python)), "-m", f"benchmarks.peers.{module}", "--bootstrap", bootstrap, "--topic",
               topic, "--out", out, "--state", str(state), "--events", str(events), "--name", tag, *flags]
    with Process(folder / f"{tag}.log", command) as process:
        found = process.finish(600)
    shutil.rmtree(state, ignore_errors=True)
    theirs, ours = peer_sessions(bootstrap, out, options.partitions), embedded_sessions(log, events, folder)
    if wrong := [name for name, value in theirs.items() if ours.get(name) != value]:
        raise RuntimeError(f"{kind}: {len(wrong)} of {len(theirs)} sessions differ, the first {wrong[0]}")
    return {"events": events, "rate": events / found["seconds"], "cpu": found["cpu"], "sessions": len(theirs),
            "unfinished": len(ours) - len(theirs)}


def embedded_sessions(log: Path, events: int, folder: Path) -> dict[str, bytes]:
    """Session id → JSON by the embedded replay of the first events, those still open included."""
    from streaming.replay import Replay
    from streaming.semantics import Semantics
    from streaming.sessions import session_json
    from streaming.store import Store

    part, state = folder / "part.jsonl", folder / "part"
    with log.open("rb") as file:
        part.write_bytes(b"".join(line for line, _ in zip(file, range(events), strict=False)))
    try:
        with Store(state, Semantics()) as store:
            Replay(store, [str(part)]).run()
            return {session.session_id: session_json(session) for _, session in store.sessions()}
    finally:
        shutil.rmtree(state)
        part.unlink()


def child(kind: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Runs a part of `python -m benchmarks.kafka` in a process of its own."""
    with Process(folder / f"{kind}.log", [sys.executable, "-m", *arguments]) as process:
        return process.finish(600)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `throughput`."""
    parser.add_argument("--events", type=int, default=1_000_000, help="size of the log")
    parser.add_argument("--log", type=Path, help="an existing log, in order of time, without repeats")
    parser.add_argument("--rounds", type=int, default=3, help="of the stream, by turns; the median counts")
    parser.add_argument("--faust-events", type=int, default=60_000, help="events that the Faust table gets")
    parser.add_argument("--quix-events", type=int, default=400_000, help="events that Quix Streams gets")
    parser.add_argument("--pack-one-events", type=int, default=200_000, help="events produced one a message for ingest")
    parser.add_argument("--peers-python", type=Path, help="interpreter with the peers' libraries; else made in the cache")
    parser.add_argument("--engines", nargs="+", default=["faust", "group"], choices=["faust", "group"])
    parser.add_argument("--only", nargs="+", default=["produce", "stream", "scale", "peers", "bare"],
                        choices=["produce", "stream", "scale", "peers", "bare"])


def measure(options: argparse.Namespace, folder: Path, bootstrap: str, broker_pids: list[int]) -> dict[str, Any]:
    """All figures, on one broker."""
    log = options.log or folder / "ordered.jsonl"
    events = lines_of(log) if options.log else ordered_log(log, options.events)
    run = f"t{time.time_ns() // 1_000_000}"
    result: dict[str, Any] = {"log_events": events, "partitions": options.partitions}
    base = Cluster(bootstrap, f"{run}-base.", options.partitions)
    result["produce"], result["ingest"] = {}, {}
    if set(options.only) - {"peers"}:
        base.create()
        began = time.monotonic()
        onerec("produce", str(log), "--pack", "200", "--end", *base.options)
        result["produce"]["200"] = events / (time.monotonic() - began)
        result["ingest"]["200"] = ingest(base, folder, events)
    if "produce" in options.only:
        part = folder / "one.jsonl"
        with log.open("rb") as file:
            lines = [line for line, _ in zip(file, range(options.pack_one_events), strict=False)]
        part.write_bytes(b"".join(lines))
        one = Cluster(bootstrap, f"{run}-one.", options.partitions).create()
        began = time.monotonic()
        onerec("produce", str(part), "--pack", "1", "--end", *one.options)
        result["produce"]["1"] = len(lines) / (time.monotonic() - began)
        result["ingest"]["1"] = ingest(one, folder, len(lines))

    def fresh(name: str) -> Cluster:
        cluster = Cluster(bootstrap, f"{run}-{name}.", options.partitions).create()
        cluster.copy_events(base)
        return cluster

    if "stream" in options.only:
        found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in options.engines}
        for number in range(options.rounds):
            for engine, rounds in found.items():
                cluster = fresh(f"{engine}{number}")
                rounds.append(stream(cluster, folder, engine, 1))
                if number == 0:
                    rounds[0]["same_sessions"] = check(sessions_of(cluster), log, events, folder)
        result["stream"] = {engine: _median(rounds) for engine, rounds in found.items()}
    if "scale" in options.only:
        result["scale"] = scale(options, folder, fresh, broker_pids, result.get("stream", {}))
    if "bare" in options.only:
        result["bare"] = child(
            "bare", folder, "benchmarks.kafka", "bare", "--bootstrap", bootstrap, "--prefix", f"{run}-base.", "--partitions",
            str(options.partitions), "--state", str(folder / "bare"), "--events", str(events),
        )
        result["embedded"] = child("embedded", folder, "benchmarks.replay", "--child", "replay", "--log", str(log),
                                   "--state", str(folder / "embedded"))
    if "peers" in options.only:
        result["peers"] = {
            kind: peer(kind, log, options, folder, bootstrap, f"{run}-peer{number}") for number, kind in enumerate(PEERS)
        }
    return result


def scale(
    options: argparse.Namespace, folder: Path, fresh: Any, broker_pids: list[int], alone: dict[str, Any]
) -> dict[str, Any]:
    """One worker and two, on all cores; and one worker sharing a single core with the broker, as half a machine has."""
    found: dict[str, Any] = {}
    for engine in options.engines:
        one = alone.get(engine) or _median(
            [stream(fresh(f"one-{engine}{n}"), folder, engine, 1) for n in range(options.rounds)]
        )
        two = [stream(fresh(f"two-{engine}{n}"), folder, engine, 2) for n in range(options.rounds)]
        found[engine] = {"1": one, "2": _median(two)}
        if broker_pids:
            every = os.sched_getaffinity(0)
            pin(broker_pids, {0})
            try:
                half = [stream(fresh(f"half-{engine}{n}"), folder, engine, 1, one_core=True) for n in range(options.rounds)]
            finally:
                pin(broker_pids, every)
            found[engine]["1 worker and broker on one core"] = _median(half)
    return found


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the median rate, and all rates."""
    ordered = sorted(rounds, key=lambda found: found["rate"])
    return {**rounds[0], **ordered[len(ordered) // 2], "rates": [round(found["rate"]) for found in rounds],
            "rate": statistics.median(found["rate"] for found in rounds)}


def check(found: dict[str, bytes], log: Path, events: int, folder: Path) -> int:
    """How many sessions there are; raises where they are not those of the embedded replay, byte for byte."""
    expected = embedded_sessions(log, events, folder)
    if found != expected:
        raise RuntimeError(f"{len(found)} sessions through Kafka, {len(expected)} embedded; "
                           f"{sum(found.get(name) != value for name, value in expected.items())} differ")
    return len(found)


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("what", "events/s", "ratio", title=f"{result['log_events']:,} events, {result['partitions']} partitions")
    stream_rate = max((found["rate"] for found in result.get("stream", {}).values()), default=None)

    def row(name: str, value: float, ratio: str = "") -> None:
        table.add_row(name, f"{value:,.0f}", ratio)

    for pack, value in result["produce"].items():
        row(f"produce, {pack} a message", value)
    for pack, found in result["ingest"].items():
        row(f"ingest, {pack} a message", found["rate"], f"{found['per_cpu_second']:,.0f} a CPU second")
    for engine, found in result.get("stream", {}).items():
        row(f"stream, one worker, {engine}", found["rate"], f"{found['per_cpu_second']:,.0f} a CPU second")
    for engine, found in result.get("scale", {}).items():
        one = found["1"]["inner_rate"]
        row(f"two workers, {engine}", found["2"]["inner_rate"], f"{found['2']['inner_rate'] / one:.2f}× of one worker")
        if half := found.get("1 worker and broker on one core"):
            row(f"one worker and broker on one core, {engine}", half["inner_rate"],
                f"{found['2']['inner_rate'] / half['inner_rate']:.2f}× with two of both")
    for name in ("bare", "embedded"):
        if name in result:
            value = result[name]["rate"]
            row({"bare": "bare consume loop", "embedded": "embedded replay, no Kafka"}[name], value,
                f"stream is {stream_rate / value:.2f}× of it" if stream_rate else "")
    for kind, found in result.get("peers", {}).items():
        row(kind, found["rate"], f"stream is {stream_rate / found['rate']:.1f}× of it" if stream_rate else "")
    Console(width=140).print(table)
