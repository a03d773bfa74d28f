"""The soak: a paced log through real processes on a real broker, hundreds of kills into it, and the reference at the end.

    python -m benchmarks.faults --kills 200 --seed 1                  # about 25 minutes; both cores
    python -m benchmarks.faults --kills 20 --minutes 1.5 --engine group

Workers, ingests, feeder, replica, producer and broker are killed at random moments, workers and ingests also inside the steps
of a write; disks are wiped or come back stale; processes freeze inside a step for longer than the session timeout. Afterwards
sessions, histories, counters, the feeder's session log and the replica are compared with `replay` of the same log.
The exit code is 1 where a single byte differs. `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kafka"))

from chaos import SHARES, WITH_TRAINER, Chaos, deck, make_log  # noqa: E402 - the harness of the tests
from comparison import Tail  # noqa: E402
from reference_log import Shape  # noqa: E402
from stack import Stack  # noqa: E402

from streaming.kafka.broker import Broker  # noqa: E402
from streaming.kafka.partitions import PartitionStore  # noqa: E402

USERS = 3_000
"""Users at once; about 0.9 lines a second of log time for a thousand of them."""


def soak(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Runs the whole thing in `folder` and returns the report."""
    seconds = options.minutes * 60
    shape = Shape(users=options.users, minutes=int(options.minutes * options.speed * 1.6) + 10, seed=options.seed)
    console.print(f"log: {shape.users:,} users, {shape.minutes:,} minutes of event time, {options.speed} times as fast")
    log, wanted = make_log(folder / "log", shape)
    console.print(f"reference: {wanted.counters}")
    rng = random.Random(options.seed)
    began = time.monotonic()
    with Broker(folder / "broker") as broker, Stack(
        folder / "run", broker.bootstrap, engine=options.engine, prefix="soak-", partitions=options.partitions
    ) as stack:
        stack.topics()
        chaos = Chaos(stack, broker, log, seed=options.seed, workers=options.workers, ingests=options.ingests,
                      trains=options.train)
        chaos.begin(options.speed)
        shares = WITH_TRAINER if options.train else SHARES

        def tell(text: str) -> None:
            console.print(f"{time.monotonic() - began:6.0f} s  {text}", highlight=False)

        chaos.run(deck(options.kills, rng, shares), seconds, tell)
        tail = chaos.finish(600)
        chaos.stop()
        console.print(f"end of the log {tail:.0f} s after the last kill; comparing")
        verdict = stack.judge(wanted, feeds=[chaos.feed], replica=chaos.replica)
        report = {
            "engine": options.engine, "seed": options.seed, "partitions": options.partitions, "workers": options.workers,
            "ingests": options.ingests, "events": wanted.counters["events"], "seconds": round(time.monotonic() - began, 1),
            "kills": len(chaos.faults), "kills_inside_a_step": chaos.inside, "freezes_inside_a_step": chaos.freezes,
            "planned_hand_overs": chaos.stops, "own_exits": chaos.exits, "own_exit_lines": chaos.error_lines[:20],
            "tail_seconds": round(tail, 1), **verdict.summary(), "recovery": chaos.recoveries(),
            "trainer": chaos.school.report if chaos.school else None, "catch_up": catch_up(stack, folder / "catch-up"),
        }
    if report["trainer"] and report["trainer"]["log"] != report["trainer"]["learnt"]:
        report["faults"].append(f"trainer: {report['trainer']}")
    if report["kills"] < options.kills:
        report["faults"].append(f"only {report['kills']} kills before the log ended; give --users or --minutes more")
    return report


def catch_up(stack: Stack, state: Path) -> dict[str, float]:
    """Seconds to restore every partition from the changelog onto an empty disk."""
    config = stack.config
    with Tail(config.kafka, "histories") as tail:
        records = sum(1 for _ in tail.rest())
    with PartitionStore(state, config.semantics, config.kafka) as store:
        began = time.monotonic()
        store.open(range(config.kafka.partitions))
        seconds = time.monotonic() - began
    return {"records": records, "seconds": round(seconds, 3), "seconds_per_million": round(seconds / max(1, records) * 1e6, 2)}


def show(report: dict[str, Any], console: Console) -> None:
    """The report as tables."""
    table = Table("kind of kill", "kills", "recovered after s, median", "max", "with no other fault meanwhile", "median", "max")

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    for kind, row in report["recovery"].items():
        table.add_row(
            kind, str(row["kills"]), cell(row["seconds_median"]), cell(row["seconds_max"]), str(row["alone"]),
            cell(row["alone_median"]), cell(row["alone_max"]),
        )
    console.print(table)
    names = (
        "events", "sessions", "kills", "kills_inside_a_step", "freezes_inside_a_step", "planned_hand_overs", "own_exits",
        "lost", "double", "different", "trainer", "catch_up", "seconds",
    )
    for name in names:
        console.print(f"{name.replace('_', ' ')}: {report[name]}", highlight=False)
    for fault in report["faults"]:
        console.print(f"FAULT {fault}", highlight=False)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("faust", "group"), default="faust")
    parser.add_argument("--minutes", type=float, help="time over which the kills are spread; default 6.5 s a kill")
    parser.add_argument("--speed", type=float, default=30, help="seconds of the log a second")
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--ingests", type=int, default=2)
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, default=True, help="a trainer beside, killed as well")
    parser.add_argument("--json", type=Path, help="file for the report")
    parser.add_argument("--keep", type=Path, help="folder for logs and states, kept; default a temporary one")
    options = parser.parse_args(words)
    if options.minutes is None:
        options.minutes = options.kills * 6.5 / 60
    return options


def main(words: list[str] | None = None) -> int:
    """0 where nothing is lost, double or different."""
    options = arguments(words)
    console = Console(width=160)
    # So that a stopped soak takes its processes along.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    folder = options.keep or Path(tempfile.mkdtemp(prefix="onerec-faults-"))
    try:
        report = soak(options, folder, console)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    show(report, console)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
