"""Kafka figures: throughput beside Faust tables and Quix Streams, latency, soak and recovery, each on a real broker.

    python -m benchmarks.kafka throughput --out figures.json    # produce, ingest, stream, two workers, peers, bare machine
    python -m benchmarks.kafka latency --out figures.json       # event → history and event → session at 20,000 events/s
    python -m benchmarks.kafka soak --out figures.json --plot soak.png   # 10 million events, a stall of 60 s in it
    python -m benchmarks.kafka recovery --out figures.json      # a wiped disk caught up from the changelog

Each starts a broker of its own, unless --bootstrap names one, and prints a table. With --out it puts its figures into a JSON
file, from which `benchmarks/capacity.py` computes the tables of docs/capacity.md. Figures of one command belong together:
ratios hold on other machines, absolute figures do not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from benchmarks import kafka_latency, kafka_load, kafka_recovery, kafka_soak, kafka_throughput
from benchmarks.kafka_tools import Cluster, broker, family

PARTS = {
    "throughput": kafka_throughput, "latency": kafka_latency, "soak": kafka_soak, "recovery": kafka_recovery,
}


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, part in PARTS.items():
        command = commands.add_parser(name, help=(part.__doc__ or "").splitlines()[0])
        command.add_argument("--bootstrap", help="an existing broker instead of one of our own")
        command.add_argument("--partitions", type=int, default=4)
        command.add_argument("--work", type=Path, help="folder for logs and states, kept; default: a temporary one")
        command.add_argument("--out", type=Path, help="also put the figures there, as JSON, beside those of other commands")
        part.arguments(command)
    for name in ("bare", "load", "paced", "catch-up"):
        helper = commands.add_parser(name)
        helper.add_argument("--bootstrap", required=True)
        helper.add_argument("--prefix", required=True)
        for option in ("--partitions", "--events", "--rate", "--pack"):
            helper.add_argument(option, type=int, default=1)
        helper.add_argument("--seconds", type=float)
        for option in ("--state", "--log"):
            helper.add_argument(option, type=Path)
    options = parser.parse_args()
    if options.command not in PARTS:
        _help(options)
        return
    part = PARTS[options.command]
    folder = options.work or Path(tempfile.mkdtemp(prefix="onerec-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with broker(folder, options.bootstrap) as (bootstrap, process):
            result = part.measure(options, folder, bootstrap, family(process.pid) if process else [])
        part.show(result)
        if options.out:
            before = json.loads(options.out.read_text()) if options.out.exists() else {}
            options.out.write_text(json.dumps({**before, options.command: result}, indent=1) + "\n")
    finally:
        if not options.work:
            shutil.rmtree(folder, ignore_errors=True)


def _help(options: argparse.Namespace) -> None:
    """What a measurement starts in a process of its own: the bare loop, live traffic, a log at a pace."""
    cluster = Cluster(options.bootstrap, options.prefix, options.partitions)
    if options.command == "bare":
        found = kafka_throughput.bare(cluster, options.state, options.events)
    elif options.command == "load":
        found = kafka_load.live(cluster, options.rate, options.seconds, options.pack)
    elif options.command == "catch-up":
        found = kafka_recovery.catch_up(cluster, options.state)
    else:
        found = kafka_load.paced(cluster, options.log, options.rate, options.pack)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
