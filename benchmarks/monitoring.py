"""What monitoring costs: throughput of replay and of serving with it and without, in turn, in one run.

    python -m benchmarks.monitoring [--quick] [--json FILE] [--only replay|serving|lockstep]

Replay: one log into a fresh state, in a process of its own; with nothing measured, or with all metrics counted, served, and
scraped every second. Serving: clients ask a real Triton as fast as it answers; with nobody watching, or with `onerec monitor`
asking it every `monitor.every_s`, and its metrics and Triton's own scraped every second. Each round runs both, the order turned
from round to round; a round's ratio is time (or time a request) with monitoring over that without, and the figure is the median
of the rounds. Processor time, of the replaying process and of Triton with the monitor for each request, tells the cost where
the clock is disturbed by others. Lockstep: what one more client, no monitor, costs as many clients as a batch holds, who ask
again at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from benchmarks.publish import save
from benchmarks.replay import make_log
from exporter.client import Client
from exporter.publish import load_repository
from exporter.publisher import publish
from exporter.server import TritonServer
from onerec.config import Config
from streaming.replay import Replay
from streaming.store import Reader, Store
from trainer.items import build_catalogue
from trainer.presets import PRESETS

BOUND: Final = 1.03
"""What monitoring may cost at most."""
SCRAPE_SECONDS: Final = 1.0
SETTLE_SECONDS: Final = 8.0
"""After the monitor's first look at a version: it reads the window that drift is held against, once in its life."""
BATCH: Final = 8
"""What Triton takes together (`serve.max_batch`)."""
CLIENTS: Final = 4 * BATCH
"""So that every batch is full, whoever else asks."""
PAUSE_SECONDS: Final = 0.05
"""A client's longest pause between two requests, drawn anew each time, so that they do not come in step."""
HISTORY: Final = 64


def scraped(address: str) -> str:
    """The metrics served there."""
    with urllib.request.urlopen(address, timeout=30) as answer:
        text: str = answer.read().decode()
    return text


@contextmanager
def scraping(addresses: Callable[[], list[str]], count: list[int]) -> Iterator[None]:
    """Asks each address every second, as Prometheus does at its most eager; `count` gets a 1 for each answer."""
    done = threading.Event()

    def ask() -> None:
        while not done.wait(SCRAPE_SECONDS):
            for address in addresses():
                try:
                    scraped(address)
                except OSError:
                    continue
                count.append(1)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def replay_here(log: Path, state: Path, folder: Path | None) -> dict[str, float]:
    """One replay in this process; with a `folder` it is measured, and its metrics' address stands there."""
    from onerec.monitor.metrics import Metrics
    from onerec.monitor.of_stream import ReplayMetrics
    from streaming.rocks import database_path

    config = Config()
    with ExitStack() as stack, Store(state, config.semantics) as store:
        measured = None
        if folder is not None:
            metrics = stack.enter_context(Metrics("replay", 0, folder=folder))
            measured = ReplayMetrics(metrics, config, database_path(state), store.counters(), time.monotonic())
        cpu = time.process_time()
        summary = Replay(store, [str(log)], on_step=measured, on_ready=measured.ready if measured else None).run()
        return {"seconds": summary["seconds"], "cpu": time.process_time() - cpu, "events": summary["events"]}


def replay_once(log: Path, folder: Path, monitored: bool) -> dict[str, float]:
    """One replay in a process of its own; `scrapes` tells how often it was asked."""
    folder.mkdir()
    words = ["--child", str(log), str(folder / "state"), *([str(folder)] if monitored else [])]
    scrapes: list[int] = []

    def addresses() -> list[str]:
        return [f"http://{path.read_text().split()[0]}/metrics" for path in folder.glob("*.address")]

    with scraping(addresses, scrapes):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.monitoring", *words], check=True, stdout=subprocess.PIPE, text=True
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "scrapes": len(scrapes)}


def replay_rounds(folder: Path, rounds: int, events: int) -> dict[str, Any]:
    """Rounds of replay, each with and without."""
    log = folder / "world.jsonl"
    make_log(log, events)
    pairs = []
    for number in range(rounds):
        pair = {}
        for monitored in (False, True) if number % 2 == 0 else (True, False):
            pair[monitored] = replay_once(log, folder / f"replay-{number}-{monitored}", monitored)
        pairs.append(pair)
        print(f"replay, round {number}: {pair}", file=sys.stderr)
    return {
        "events": pairs[0][True]["events"],
        "events_per_second": {name: statistics.median(pair[on]["events"] / pair[on]["seconds"] for pair in pairs)
                              for name, on in (("without", False), ("with", True))},
        "scrapes": sum(pair[True]["scrapes"] for pair in pairs),
        **ratios([pair[True]["seconds"] / pair[False]["seconds"] for pair in pairs]),
        "cpu": ratios([pair[True]["cpu"] / pair[False]["cpu"] for pair in pairs]),
    }


def ratios(found: list[float]) -> dict[str, Any]:
    """Median, and from where to where they lie."""
    return {"ratio": statistics.median(found), "least": min(found), "most": max(found), "rounds": len(found)}


def small_state(folder: Path) -> tuple[Path, list[list[str]]]:
    """A replayed world with a catalogue of random codes; and histories to ask with."""
    log, state = folder / "small.jsonl", folder / "state"
    make_log(log, 20_000)
    with Store(state, Config().semantics) as store:
        Replay(store, [str(log.with_suffix(".items.jsonl")), str(log)]).run()
    rng = np.random.default_rng(0)
    with Reader(state) as reader:
        names = [item.item_id for _, item in reader.items()]
        codes = rng.integers(0, PRESETS["tiny"].codes, (len(names), PRESETS["tiny"].levels)).tolist()
        path = folder / "codes.jsonl"
        path.write_bytes(b"\n".join(
            orjson.dumps({"item_id": name, "codes": row}) for name, row in zip(names, codes, strict=True)
        ))
        build_catalogue(state, reader, Config(), codes_file=path)
    return state, [[names[row] for row in rng.integers(0, len(names), HISTORY)] for _ in range(256)]


def asked(
    server: str, histories: list[list[str]], seconds: float, clients: int = CLIENTS, pause: float = PAUSE_SECONDS
) -> float:
    """Requests a second that Triton answers to so many clients, who each ask again after a pause of up to `pause` seconds."""
    until = time.monotonic() + seconds

    def ask(number: int) -> int:
        count, pauses = 0, np.random.default_rng(number)
        with Client(server, timeout=60) as client:
            while time.monotonic() < until:
                client.recommend(history=histories[(number + count * clients) % len(histories)])
                count += 1
                time.sleep(float(pauses.uniform(0.0, pause)))
        return count

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        total = sum(pool.map(ask, range(clients)))
    return total / (time.monotonic() - began)


def children_cpu() -> float:
    """Processor seconds so far of the processes below this one that still run."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(name))
        ticks[int(name)] = int(fields[11]) + int(fields[12])
    total, left = 0, list(children.get(os.getpid(), []))
    while left:
        pid = left.pop()
        total += ticks[pid]
        left += children.get(pid, [])
    return total / os.sysconf("SC_CLK_TCK")


def asked_and_cpu(server: str, histories: list[list[str]], seconds: float) -> tuple[float, float]:
    """Requests a second, and processor seconds of Triton and of whoever watches it for each of them."""
    before, began = children_cpu(), time.monotonic()
    rate = asked(server, histories, seconds)
    return rate, (children_cpu() - before) / (rate * (time.monotonic() - began))


@contextmanager
def watched(state: Path, run: Path, repository: Path, server: TritonServer, folder: Path) -> Iterator[None]:
    """`onerec monitor` beside the server, both scraped, once it has settled."""
    address = folder / "monitor.address"
    scrapes: list[int] = []
    monitor = subprocess.Popen([
        sys.executable, "-m", "onerec.cli", "monitor", "--state", str(state), "--run", str(run), "--repository",
        str(repository), "--server", server.url, "--metrics-port", "0", "--set", f"metrics.folder={folder}",
    ])
    try:
        deadline = time.monotonic() + 120
        while not (address.exists() and "onerec_replica_version{" in scraped(f"http://{address.read_text().split()[0]}/metrics")):
            if monitor.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("onerec monitor has not seen a version")
            time.sleep(0.2)
        time.sleep(SETTLE_SECONDS)
        pages = [f"http://{address.read_text().split()[0]}/metrics", server.metrics_url]
        with scraping(lambda: pages, scrapes):
            yield
    finally:
        monitor.send_signal(signal.SIGTERM)
        monitor.wait(60)


def serving_rounds(folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Rounds of serving, each with and without."""
    state, histories = small_state(folder)
    run, repository = folder / "run", folder / "repository"
    repository.mkdir()
    save(run, state, "tiny", 1)
    found: list[dict[bool, tuple[float, float]]] = []
    with TritonServer(repository, state) as server:
        with Client(server.url, timeout=60) as client:
            load_repository(repository, client)
        publish(run, repository, server=server.url)
        asked(server.url, histories, min(3.0, seconds))
        for number in range(rounds):
            pair = {}
            for monitored in (False, True) if number % 2 == 0 else (True, False):
                with watched(state, run, repository, server, folder) if monitored else ExitStack():
                    pair[monitored] = asked_and_cpu(server.url, histories, seconds)
            found.append(pair)
            print(f"serving, round {number}: {pair}", file=sys.stderr)
    return {
        "clients": CLIENTS,
        "requests_per_second": {name: statistics.median(pair[on][0] for pair in found)
                                for name, on in (("without", False), ("with", True))},
        **ratios([pair[False][0] / pair[True][0] for pair in found]),
        "cpu": ratios([pair[True][1] / pair[False][1] for pair in found]),
    }


@contextmanager
def one_more(server: TritonServer, histories: list[list[str]]) -> Iterator[None]:
    """A further client, who asks once a second."""
    stop = threading.Event()

    def ask() -> None:
        with Client(server.url, timeout=60) as client:
            while not stop.wait(1.0):
                client.recommend(history=histories[0])

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def lockstep_rounds(folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Rounds of `BATCH` clients without a pause, alone and with one more who asks once a second; nobody monitors."""
    state, histories = small_state(folder)
    run, repository = folder / "run", folder / "repository"
    repository.mkdir()
    save(run, state, "tiny", 1)
    found: list[dict[bool, float]] = []
    with TritonServer(repository, state) as server:
        with Client(server.url, timeout=60) as client:
            load_repository(repository, client)
        publish(run, repository, server=server.url)
        for number in range(rounds):
            pair = {}
            for joined in (False, True) if number % 2 == 0 else (True, False):
                with one_more(server, histories) if joined else ExitStack():
                    pair[joined] = asked(server.url, histories, seconds, BATCH, 0.0)
            found.append(pair)
            print(f"lockstep, round {number}: {pair}", file=sys.stderr)
    return {
        "clients": BATCH,
        "requests_per_second": {name: statistics.median(pair[on] for pair in found)
                                for name, on in (("without", False), ("with", True))},
        **ratios([pair[False] / pair[True] for pair in found]),
    }


def show(found: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("", "without", "with", "ratio (median)", "least", "most", title="what monitoring costs", width=110)
    for name, figure in found.items():
        rate = figure.get("events_per_second") or figure["requests_per_second"]
        unit = "events/s" if name == "replay" else "requests/s"
        lines = [(name, *(f"{rate[each]:,.0f} {unit}" for each in ("without", "with")), figure)]
        if "cpu" in figure:
            lines.append((f"{name}, processor time", "", "", figure["cpu"]))
        for title, without, with_it, ratio in lines:
            table.add_row(title, without, with_it, *(f"{ratio[key]:.3f}" for key in ("ratio", "least", "most")))
    Console(width=120).print(table)


def main() -> None:
    """Measures, prints, and writes JSON where it is asked for; status 1 where a ratio is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds of a tenth of the size: that it works, no figures")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--events", type=int, default=1_000_000, help="of the log that is replayed")
    parser.add_argument("--seconds", type=float, default=20.0, help="of serving, with and without, in each round")
    parser.add_argument("--only", choices=["replay", "serving", "lockstep"])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--child", nargs="+", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        log, state, *folder = options.child
        print(json.dumps(replay_here(log, state, folder[0] if folder else None)))
        return
    if options.quick:
        options.rounds, options.events, options.seconds = 2, options.events // 10, options.seconds / 5
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="onerec-bench-") as scratch:
        if options.only in (None, "replay"):
            found["replay"] = replay_rounds(Path(scratch), options.rounds, options.events)
        if options.only in (None, "serving"):
            found["serving"] = serving_rounds(Path(scratch), options.rounds, options.seconds)
        if options.only == "lockstep":
            found["lockstep"] = lockstep_rounds(Path(scratch), options.rounds, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    over = [name for name, figure in found.items() if figure["ratio"] > BOUND and name != "lockstep"]
    if over:
        sys.exit(f"above {BOUND}: {', '.join(over)}")


if __name__ == "__main__":
    main()
