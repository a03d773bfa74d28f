"""Seconds from an event to the history on a serving host, and from the moment a session may be final to its place in Kafka.

Event → history: from the event's time, which is when the producer made it, until the state of `onerec histories-replica` gives
it to a reader in another process. One probe every 20 ms: a user never seen before. Event → session: from `end` + gap +
out-of-orderness, when the watermark passes, until the session is read, committed, from `sessions`; every session counts. The
gap is 2 s here, so that live traffic makes sessions within the run; waiting for the gap itself is in neither figure.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import orjson
from confluent_kafka import Consumer, TopicPartition
from rich.console import Console
from rich.table import Table

from benchmarks.kafka_load import ITEMS, probe
from benchmarks.kafka_tools import Cluster, Process, onerec, percentile, wait_for
from streaming.kafka.settings import consumer
from streaming.store import Reader

GAP_MS: Final = 2_000
ORDER_MS: Final = 500
LOOK_SECONDS: Final = 0.02
SETTINGS: Final = [f"session.gap_ms={GAP_MS}", f"stream.max_out_of_orderness_ms={ORDER_MS}"]
AHEAD: Final = 200
"""Probes looked up beyond the newest one seen: what comes in four seconds."""
SHARES: Final = (0.5, 0.95, 0.99)


class Sessions(threading.Thread):
    """Reads `sessions` as they are committed: (time of arrival, how late after the watermark) of each, seconds."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.late: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._partitions = cluster.partitions
        self._topic = cluster.config.named("sessions")
        self._reader = Consumer(consumer(cluster.config, group_id=cluster.config.named("bench"), fetch_wait_max_ms=10))

    def run(self) -> None:
        """Until `end`."""
        self._reader.assign([TopicPartition(self._topic, p, 0) for p in range(self._partitions)])
        while not self._over.is_set():
            messages = self._reader.consume(1_000, LOOK_SECONDS)
            now = time.time()
            for message in messages:
                if not message.error():
                    end = orjson.loads(message.value() or b"{}")["end"]
                    self.late.append((now, now - (end + GAP_MS + ORDER_MS) / 1000))
        self._reader.close()

    def end(self) -> list[tuple[float, float]]:
        """Stops it; what it saw."""
        self._over.set()
        self.join()
        return self.late


class Histories(threading.Thread):
    """Looks the probes up in a replica's state: (time of the look, age of the event) of each, seconds."""

    def __init__(self, state: Path) -> None:
        super().__init__(daemon=True)
        self.ages: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._reader = Reader(state)

    def run(self) -> None:
        """Until `end`."""
        seen: set[int] = set()
        low = high = 0
        while not self._over.wait(LOOK_SECONDS):
            self._reader.refresh()
            now = time.time()
            # Partitions are not committed together: a later probe may be there before an earlier one.
            for number in range(low, high + AHEAD):
                if number not in seen and (history := self._reader.history(probe(number))):
                    self.ages.append((now, now - int(history[0][1:]) / 1000))
                    seen.add(number)
                    high = max(high, number + 1)
            while low in seen:
                seen.discard(low)
                low += 1
        self._reader.close()

    def end(self) -> list[tuple[float, float]]:
        """Stops it; what it saw."""
        self._over.set()
        self.join()
        return self.ages


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `latency`."""
    parser.add_argument("--rate", type=int, default=20_000, help="events a second")
    parser.add_argument("--seconds", type=float, default=60, help="measured, after --warm")
    parser.add_argument("--warm", type=float, default=15, help="seconds before anything counts")
    parser.add_argument("--pack", type=int, default=1, help="events of a partition within 20 ms in one raw message, at most")
    parser.add_argument("--engines", nargs="+", default=["faust", "group"], choices=["faust", "group"])
    parser.add_argument("--set", action="append", default=[], dest="settings", help="a setting of all commands")
    parser.add_argument("--no-trainer", action="store_true", help="leave out the round with feeder and trainer")


def measure(options: argparse.Namespace, folder: Path, bootstrap: str, broker_pids: list[int]) -> dict[str, Any]:
    """Each engine with the trainer off, then the first of them with feeder and trainer on."""
    run = f"l{time.time_ns() // 1_000_000}"
    rounds = [(engine, False) for engine in options.engines]
    rounds += [] if options.no_trainer else [(options.engines[0], True)]
    result: dict[str, Any] = {"rate": options.rate, "seconds": options.seconds, "pack": options.pack,
                              "settings": options.settings, "rounds": []}
    for number, (engine, training) in enumerate(rounds):
        cluster = Cluster(bootstrap, f"{run}-{number}.", options.partitions, [*SETTINGS, *options.settings]).create()
        place = folder / f"{run}-{number}"
        place.mkdir()
        result["rounds"].append({"engine": engine, "trainer": training, **_round(cluster, place, engine, training, options)})
    return result


def _round(cluster: Cluster, folder: Path, engine: str, training: bool, options: argparse.Namespace) -> dict[str, Any]:
    state = folder / "replica"

    def command(name: str, *arguments: str) -> Process:
        return Process.onerec(folder / f"{name}.log", name, *arguments, *cluster.options)

    with contextlib.ExitStack() as stack:
        processes = {
            "ingest": command("ingest"),
            "stream": command("stream", "--state", str(folder / "worker"), "--engine", engine),
            "replica": command("histories-replica", "--state", str(state)),
        }
        if training:
            processes |= _train(cluster, folder)
        for process in processes.values():
            stack.enter_context(process)
        wait_for(lambda: (state / "db" / "CURRENT").exists(), 60, "the replica's state")
        time.sleep(2)
        histories, sessions = Histories(state), Sessions(cluster)
        load = stack.enter_context(Process(folder / "load.log", [
            sys.executable, "-m", "benchmarks.kafka", "load", "--bootstrap", cluster.bootstrap, "--prefix",
            cluster.config.prefix, "--partitions", str(cluster.partitions), "--rate", str(options.rate), "--pack",
            str(options.pack), "--seconds", str(options.warm + options.seconds),
        ]))
        histories.start()
        sessions.start()
        time.sleep(options.warm)
        since, before = time.time(), {name: process.cpu() for name, process in processes.items()}
        time.sleep(options.seconds - 1)
        until = time.time()
        used = {name: (process.cpu() - before[name]) / (until - since) for name, process in processes.items()}
        memory = {name: round(process.resident()) for name, process in processes.items()}
        sent = load.finish(120)
        time.sleep(2)
        ages, late = histories.end(), sessions.end()
        if broken := [name for name, process in processes.items() if not process.running]:
            raise RuntimeError(f"{broken[0]} ended: {processes[broken[0]].text()[-2000:]}")
    return {
        "history": _shares([age for at, age in ages if since <= at < until]),
        "session": _shares([value for at, value in late if since <= at < until]),
        "sent": sent, "cpu_cores": {name: round(value, 3) for name, value in used.items()}, "resident_mb": memory,
    }


def _train(cluster: Cluster, folder: Path) -> dict[str, Process]:
    """A feeder, a catalogue with random codes, and the trainer on it."""
    import numpy as np

    state, items, codes = folder / "feed", folder / "items.jsonl", folder / "codes.jsonl"
    names = [f"v{number}" for number in range(ITEMS)]
    rows = np.random.default_rng(0).integers(0, 256, (ITEMS, 3)).tolist()
    items.write_bytes(b"".join(
        orjson.dumps({"type": "item", "item_id": name, "ts": 1_704_067_200_000, "duration_ms": 30_000}) + b"\n"
        for name in names
    ))
    codes.write_bytes(b"".join(
        orjson.dumps({"item_id": name, "codes": row}) + b"\n" for name, row in zip(names, rows, strict=True)
    ))
    onerec("produce", "--items", str(items), *cluster.options)
    feed = Process.onerec(folder / "feed.log", "feed", "--state", str(state), *cluster.options)

    def built() -> bool:
        with contextlib.suppress(RuntimeError):
            return bool(onerec("items", "--state", str(state), "--codes-file", str(codes), "--json"))
        return False

    wait_for(built, 120, "the catalogue of the feeder", every=1)
    train = Process.onerec(folder / "train.log", "train", "--state", str(state), "--run", str(folder / "run"), "--follow",
                           "--preset", "tiny")
    return {"feed": feed, "train": train}


def _shares(values: list[float]) -> dict[str, float]:
    if not values:
        raise RuntimeError("nothing arrived within the time measured")
    return {"count": len(values), **{f"p{round(100 * share)}": round(percentile(values, share), 3) for share in SHARES},
            "max": round(max(values), 3)}


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("engine", "trainer", "what", "count", "p50", "p95", "p99", "max",
                  title=f"{result['rate']:,} events/s, {result['pack']} a raw message; seconds")
    for found in result["rounds"]:
        for name in ("history", "session"):
            values = found[name]
            table.add_row(found["engine"], "on" if found["trainer"] else "off", f"event → {name}", f"{values['count']:,}",
                          *(f"{values[key]:.3f}" for key in ("p50", "p95", "p99", "max")))
        Console(width=140).print(f"{found['engine']}: cores used {found['cpu_cores']}, producer behind at most "
                                 f"{found['sent']['behind_ms']} ms")
    Console(width=140).print(table)
