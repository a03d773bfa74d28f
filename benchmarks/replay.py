"""Events a second through parse, identity, sessions and RocksDB commit on one core, beside a bare loop; memory over the log.

    python benchmarks/replay.py                      # 1 million events of the simulated world, three rounds
    python benchmarks/replay.py --events 10000000 --rounds 1   # memory from 1 to 10 million events

The bare loop is the least that any such program does: `orjson.loads` of every line and its bytes put into one RocksDB
WriteBatch per 5,000 lines. Both run in processes of their own, pinned to the same one core, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

EVENTS_PER_USER_DAY = 21


def resident_mb() -> float:
    """Resident memory of this process, MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_replay(log: Path, state: Path, core: int) -> dict:
    """One replay in this process: events/s, CPU seconds, resident MiB at each million events."""
    os.sched_setaffinity(0, {core})
    from streaming.replay import Replay, Step
    from streaming.semantics import Semantics
    from streaming.store import Store

    memory: dict[int, float] = {}

    def step(step: Step) -> None:
        memory.setdefault(step.counters.events // 1_000_000, round(resident_mb(), 1))

    began, cpu = time.monotonic(), time.process_time()
    with Store(state, Semantics()) as store:
        summary = Replay(store, [str(log)], on_step=step).run()
    seconds = time.monotonic() - began
    return {**summary, "wall": seconds, "cpu": time.process_time() - cpu, "memory": memory, "rate": summary["events"] / seconds}


def run_bare(log: Path, state: Path, core: int) -> dict:
    """The bare loop in this process."""
    os.sched_setaffinity(0, {core})
    from rocksdict import Options, Rdict, WriteBatch

    began, cpu = time.monotonic(), time.process_time()
    db = Rdict(str(state), Options(raw_mode=True))
    count = 0
    with log.open("rb") as file:
        batch = WriteBatch(raw_mode=True)
        for line in file:
            event = orjson.loads(line)
            batch.put(b"%s:%d" % (event["user_id"].encode(), count), line)
            count += 1
            if count % 5_000 == 0:
                db.write(batch)
                batch = WriteBatch(raw_mode=True)
        db.write(batch)
    db.close()
    seconds = time.monotonic() - began
    return {"events": count, "wall": seconds, "cpu": time.process_time() - cpu, "rate": count / seconds}


def child(kind: str, log: Path, state: Path, core: int) -> dict:
    """Runs `kind` in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, "--log", str(log), "--state", str(state), "--core", str(core)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_log(path: Path, events: int) -> None:
    """A simulated log of about so many events: 10 days of as many users as that takes, from 2 million on 80 days."""
    days = 10 if events < 2_000_000 else 80
    users = max(100, events // (EVENTS_PER_USER_DAY * days))
    subprocess.run(
        [sys.executable, "-m", "onerec.cli", "simulate", "--out", str(path), "--users", str(users), "--items", "5000",
         "--days", str(days), "--seed", "1"],
        check=True,
    )


def main() -> None:
    """Measures, prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log", type=Path, help="an existing JSON-lines log instead of a simulated one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=["replay", "bare"], help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({"replay": run_replay, "bare": run_bare}[options.child](options.log, options.state, options.core)))
        return
    work = Path(tempfile.mkdtemp(prefix="onerec-bench-"))
    try:
        log = options.log
        if log is None:
            log = work / "world.jsonl"
            make_log(log, options.events)
        rounds = []
        for number in range(options.rounds):
            pair = {kind: child(kind, log, work / f"{kind}{number}", 0) for kind in ("bare", "replay")}
            size = sum(f.stat().st_size for f in (work / f"replay{number}").rglob("*") if f.is_file())
            rounds.append({**pair, "ratio": pair["replay"]["rate"] / pair["bare"]["rate"],
                           "cpu_ratio": pair["bare"]["cpu"] / pair["replay"]["cpu"], "state_bytes": size})
            for kind in ("bare", "replay"):
                shutil.rmtree(work / f"{kind}{number}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = {
        "events": rounds[0]["replay"]["events"],
        "users": rounds[0]["replay"]["users"],
        "sessions": rounds[0]["replay"]["sessions"],
        "replay_events_per_second": round(statistics.median(r["replay"]["rate"] for r in rounds)),
        "replay_events_per_cpu_second": round(statistics.median(r["replay"]["events"] / r["replay"]["cpu"] for r in rounds)),
        "bare_events_per_second": round(statistics.median(r["bare"]["rate"] for r in rounds)),
        "ratio": round(statistics.median(r["ratio"] for r in rounds), 3),
        "cpu_ratio": round(statistics.median(r["cpu_ratio"] for r in rounds), 3),
        "state_bytes_per_user": round(rounds[0]["state_bytes"] / rounds[0]["replay"]["users"]),
        "memory_mb_by_million": rounds[0]["replay"]["memory"],
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table("figure", "value")
    for key, value in result.items():
        table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, (int, float)) else str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
