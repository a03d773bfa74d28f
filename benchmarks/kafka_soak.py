"""Ten million events at a pace: memory of ingest and worker, lag over a stall of a minute, RocksDB bytes a user, recovery.

The worker is frozen (SIGSTOP) half-way for longer than the session timeout, so it loses its partitions, wakes up fenced, and
has to take them over again before it can catch up. Lag counts messages of `events` that are not in committed sessions and
histories yet; it is back when it is no more than it was at most in the thirty seconds before the stall.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.kafka_recovery import recovery
from benchmarks.kafka_tools import Cluster, Process, Sampler, lines_of, onerec, size_of, wait_for
from streaming.kafka.progress import ProgressLog

EVERY_SECONDS: Final = 2.0
TOPICS: Final = ("watch", "interactions", "events", "sessions", "histories", "progress")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `soak`."""
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=96_000, help="more than are kept decoded in memory")
    parser.add_argument("--days", type=int, default=5, help="of the simulated log; 21 events a user and day")
    parser.add_argument("--rate", type=int, default=25_000, help="events a second")
    parser.add_argument("--pack", type=int, default=20, help="events of a partition within 20 ms in one raw message, at most")
    parser.add_argument("--log", type=Path, help="an existing JSON-lines log instead of a simulated one")
    parser.add_argument("--stall", type=float, default=60, help="seconds the worker is frozen, half-way")
    parser.add_argument("--engine", default="faust", choices=["faust", "group"])
    parser.add_argument("--plot", type=Path, help="draw memory and lag to this file")


class Figures:
    """What is sampled while the log runs."""

    def __init__(self, cluster: Cluster, processes: dict[str, Process]) -> None:
        self._cluster, self._processes = cluster, processes
        self._progress = ProgressLog(cluster.config)

    def __call__(self) -> dict[str, Any]:
        """Events committed, messages behind, resident MiB of each process."""
        self._progress.refresh()
        parts = self._progress.partitions
        # The marker of the last transaction stands behind the last message and is never read.
        behind = sum(
            max(0, end - 1 - (parts[partition].offset if partition in parts else 0))
            for partition, end in self._cluster.ends("events").items()
        )
        return {
            "events": sum(part.counters.events + part.counters.dead_letters for part in parts.values()),
            "users": sum(part.counters.users for part in parts.values()),
            "behind": behind,
            "resident_mb": {name: round(process.resident(), 1) for name, process in self._processes.items()},
        }


def measure(options: argparse.Namespace, folder: Path, bootstrap: str, broker_pids: list[int]) -> dict[str, Any]:
    """The whole run."""
    log = options.log or folder / "soak.jsonl"
    if not options.log:
        onerec("simulate", "--out", str(log), "--users", str(options.users), "--items", "20000", "--days", str(options.days),
               "--seed", "1", "--no-embeddings", "--json")
    events = lines_of(log)
    if events > options.events:
        cut = folder / "cut.jsonl"
        with log.open("rb") as file, cut.open("wb") as part:
            part.writelines(line for line, _ in zip(file, range(options.events), strict=False))
        events, log = options.events, cut
    cluster = Cluster(bootstrap, f"s{time.time_ns() // 1_000_000}.", options.partitions).create()
    state = folder / "worker"
    with (
        Process.onerec(folder / "ingest.log", "ingest", *cluster.options) as ingesting,
        Process.onerec(folder / "stream.log", "stream", "--state", str(state), "--engine", options.engine,
                       *cluster.options) as streaming,
        Process(folder / "paced.log", [
            sys.executable, "-m", "benchmarks.kafka", "paced", "--bootstrap", bootstrap, "--prefix", cluster.config.prefix,
            "--partitions", str(options.partitions), "--rate", str(options.rate), "--pack", str(options.pack),
            "--log", str(log),
        ]) as paced,
    ):
        sampler = Sampler(Figures(cluster, {"ingest": ingesting, "stream": streaming}), EVERY_SECONDS)
        sampler.start()

        def reached(count: int) -> bool:
            for process in (ingesting, streaming):
                if not process.running:
                    raise RuntimeError(process.text()[-2000:])
            return bool(sampler.values) and sampler.values[-1][1]["events"] >= count

        wait_for(lambda: reached(events // 2), 3 * events / options.rate + 120, "half of the log")
        frozen = time.monotonic() - sampler.began
        streaming.signal(signal.SIGSTOP)
        time.sleep(options.stall)
        streaming.signal(signal.SIGCONT)
        woken = time.monotonic() - sampler.began
        wait_for(lambda: not paced.running and sampler.values[-1][1]["behind"] == 0 and reached(events),
                 5 * events / options.rate + 120, "the end of the log")
        samples = sampler.end()
        sent = paced.finish(60)
    result = {
        "events": events, "rate": options.rate, "engine": options.engine, "stall_seconds": options.stall, "sent": sent,
        "applied": samples[-1][1]["events"], "users": samples[-1][1]["users"],
        "frozen_at": round(frozen, 1), "woken_at": round(woken, 1), **_stall(samples, frozen, woken),
        "resident_mb": _memory(samples, events), "state_bytes_per_user": round(size_of(state / "db") / samples[-1][1]["users"]),
    }
    topics = {
        name: sum(path.stat().st_size for path in folder.glob(f"kafka/**/{cluster.config.named(name)}-*/*.log"))
        for name in TOPICS
    }
    if any(topics.values()):
        result["topic_bytes_per_event"] = {name: round(size / events, 1) for name, size in topics.items()}
    shutil.rmtree(state)
    result["recovery"] = recovery(cluster, folder)
    if options.plot:
        plot(result, samples, options.plot)
    return result


def _stall(samples: list[tuple[float, Any]], frozen: float, woken: float) -> dict[str, Any]:
    """How far the worker fell behind, seconds from its waking until the lag was back, and its pace meanwhile."""
    before = max((found["behind"] for at, found in samples if frozen - 30 <= at < frozen), default=0)
    worst = max(found["behind"] for at, found in samples if at >= frozen)
    back = next((at for at, found in samples if at > woken and found["behind"] <= before), None)
    first = next((at for at, found in samples if at > woken and found["events"] > _at(samples, woken)), None)
    caught = None if back is None or back == first else (_at(samples, back) - _at(samples, first)) / (back - first)
    return {"lag_before": before, "lag_worst": worst,
            "first_commit_after_seconds": None if first is None else round(first - woken, 1),
            "lag_back_after_seconds": None if back is None else round(back - woken, 1),
            "events_per_second_behind": None if caught is None else round(caught)}


def _at(samples: list[tuple[float, Any]], when: float) -> int:
    return max((found["events"] for at, found in samples if at <= when), default=0)


def _memory(samples: list[tuple[float, Any]], events: int) -> dict[str, dict[str, float]]:
    """Resident MiB of each process when so many tenths of the events were applied."""
    found: dict[str, dict[str, float]] = {}
    for tenth in range(1, 11):
        sample = next((value for _, value in samples if value["events"] >= events * tenth // 10), samples[-1][1])
        for name, value in sample["resident_mb"].items():
            found.setdefault(name, {})[f"{tenth * 10} %"] = value
    return found


def plot(result: dict[str, Any], samples: list[tuple[float, Any]], path: Path) -> None:
    """Memory above, lag below, over the seconds of the run."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    seconds = [at for at, _ in samples]
    figure, (memory, lag) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    for name in ("stream", "ingest"):
        memory.plot(seconds, [found["resident_mb"][name] for _, found in samples], label=f"onerec {name}")
    memory.set(ylabel="resident, MiB", ylim=(0, None))
    memory.legend(loc="lower right")
    lag.plot(seconds, [found["behind"] for _, found in samples], color="tab:red")
    lag.axvspan(result["frozen_at"], result["woken_at"], color="0.9", label="worker frozen")
    lag.set(ylabel="messages behind", xlabel=f"seconds, {result['rate']:,} events/s", ylim=(0, None))
    lag.legend()
    figure.savefig(path, dpi=120)


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("figure", "value", title=f"{result['events']:,} events at {result['rate']:,}/s, {result['engine']}")
    for key in ("applied", "users", "lag_before", "lag_worst", "first_commit_after_seconds", "lag_back_after_seconds",
                "events_per_second_behind", "state_bytes_per_user"):
        table.add_row(key.replace("_", " "), f"{result[key]:,}" if result[key] is not None else "never")
    for name, values in result["resident_mb"].items():
        table.add_row(f"resident MiB of {name}, each tenth", ", ".join(f"{value:,.0f}" for value in values.values()))
    for name, value in result.get("topic_bytes_per_event", {}).items():
        table.add_row(f"bytes an event in {name}", f"{value:,}")
    for name, value in result["recovery"].items():
        table.add_row(f"recovery: {name.replace('_', ' ')}", f"{value:,.1f}")
    Console(width=140).print(table)

