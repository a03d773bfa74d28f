"""Seconds to catch up an empty disk from the changelog, per million records, beside a bare read of the same records."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.kafka_throughput import ingest, stream
from benchmarks.kafka_tools import Cluster, Process, onerec, ordered_log, size_of
from streaming.kafka.partitions import PartitionStore
from streaming.semantics import Semantics


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `recovery`."""
    parser.add_argument("--events", type=int, default=2_000_000, help="size of the log that makes the changelog")
    parser.add_argument("--rounds", type=int, default=3)


def measure(options: argparse.Namespace, folder: Path, bootstrap: str, broker_pids: list[int]) -> dict[str, Any]:
    """Makes a changelog, then opens its partitions with an empty disk, several times."""
    log = folder / "ordered.jsonl"
    events = ordered_log(log, options.events)
    cluster = Cluster(bootstrap, f"r{time.time_ns() // 1_000_000}.", options.partitions).create()
    onerec("produce", str(log), "--pack", "200", "--end", *cluster.options)
    ingest(cluster, folder, events)
    stream(cluster, folder, "group", 1)
    return {"events": events, "rounds": [recovery(cluster, folder) for _ in range(options.rounds)]}


def recovery(cluster: Cluster, folder: Path) -> dict[str, Any]:
    """Seconds to open all partitions with an empty disk, in a process of its own, and per million changelog records."""
    command = [sys.executable, "-m", "benchmarks.kafka", "catch-up", "--bootstrap", cluster.bootstrap, "--prefix",
               cluster.config.prefix, "--partitions", str(cluster.partitions), "--state", str(folder / "recovered")]
    with Process(folder / "recovery.log", command) as process:
        found = process.finish(900)
    shutil.rmtree(folder / "recovered")
    partitions: list[int] = []
    began = time.monotonic()
    cluster.read("histories", lambda message: partitions.append(message.partition()))
    bare = time.monotonic() - began
    records = len(partitions)
    return {"records": records, "seconds": found["seconds"], "seconds_per_million": found["seconds"] / records * 1e6,
            "bare_read_seconds_per_million": bare / records * 1e6, "bytes": found["bytes"]}


def catch_up(cluster: Cluster, state: Path) -> dict[str, Any]:
    """Opens all partitions with a new disk."""
    began = time.monotonic()
    with PartitionStore(state, Semantics(), cluster.config) as store:
        store.open(range(cluster.partitions))
        seconds = time.monotonic() - began
    return {"seconds": seconds, "bytes": size_of(state)}


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("records", "seconds", "a million", "bare read, a million", title=f"changelog of {result['events']:,} events")
    for found in result["rounds"]:
        table.add_row(f"{found['records']:,}", f"{found['seconds']:.2f}", f"{found['seconds_per_million']:.1f} s",
                      f"{found['bare_read_seconds_per_million']:.1f} s")
    Console(width=140).print(table)
