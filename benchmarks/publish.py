"""Seconds from a checkpoint to the first answer of the new version through a real Triton; Triton's cost a request.

    python -m benchmarks.publish [--presets tiny small] [--items 10000] [--rounds 5] [--json]

Each round publishes other weights into a running server and ends when the new version has answered, then a version that only
brings new items; both by one long-lived publisher, the release gate on, with 256 sessions in the log. The way without a
template (trace the whole search, as `torch.onnx.export` does for any model, then the same steps) is measured once a
preset in the same run. Requests are asked one at a time, in turn of Triton and of ONNX Runtime called in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from rich.console import Console
from rich.table import Table

from exporter.client import Client
from exporter.export import Export
from exporter.publish import load_repository
from exporter.publisher import Outcome, Publisher
from exporter.repository import Repository
from exporter.server import TritonServer
from onerec.config import Config
from onerec.monitor.settings import GateConfig
from serving_config.recommend.engine import Engine, Wanted
from streaming.items import ItemRecord
from streaming.semantics import Semantics
from streaming.sessions import Session, SessionItem
from streaming.store import Reader, Store
from trainer.checkpoint import Checkpoint, Cursor, save_checkpoint
from trainer.items import build_catalogue, load_catalogue
from trainer.model import OneRec
from trainer.presets import PRESETS

WIDTH = 128
HISTORY = 64
CLIENTS = 8
STEPS = ("checkpoint", "catalogue", "weights", "parity", "seal", "gate", "install", "load", "ask")
ITEM_STEPS = ("catalogue", "seal", "install", "load", "ask")
SESSIONS = 256


def make_state(state: Path, items: int, codes: int) -> None:
    """A state whose catalogue has `items` items with random codes."""
    rng = np.random.default_rng(0)
    names = [f"v{number}" for number in range(items)]
    with Store(state, Semantics()) as store:
        records = [
            ItemRecord(item_id=name, ts=1, duration_ms=10_000, tags=["tag"], author_id=None, embedding=None)
            for name in names
        ]
        store.put_items(records)
        store.append([random_session(number, names, rng) for number in range(SESSIONS)], {}, watermark=SESSIONS)
    codes_file = state / "codes.jsonl"
    codes_file.write_bytes(
        b"\n".join(
            orjson.dumps({"item_id": name, "codes": row})
            for name, row in zip(names, rng.integers(0, codes, (items, 3)).tolist(), strict=True)
        )
    )
    with Reader(state) as reader:
        build_catalogue(state, reader, Config(), codes_file=codes_file)


def random_session(number: int, names: list[str], rng: np.random.Generator) -> Session:
    """A high-quality session of five items after a history of `HISTORY`."""
    drawn = [names[row] for row in rng.integers(0, len(names), HISTORY + 5)]
    items = [
        SessionItem(item_id=name, ts=number, watch_ms=10_000, duration_ms=10_000, interactions=[], effective=True)
        for name in drawn[:5]
    ]
    return Session(
        session_id=f"u{number}:{number}", user_id=f"u{number}", request_id=None, start=number, end=number, items=items,
        history=drawn[5:], watched=5, total_watch_ms=50_000, interactions=0, high_quality=True, swt=1.0, vtr=1.0, wtr=0, ltr=0,
        positives=[],
    )  # fmt: skip


def save(run: Path, state: Path, preset: str, step: int) -> None:
    """A checkpoint of the preset with random weights, as the trainer writes it."""
    catalogue = load_catalogue(state)
    torch.manual_seed(step)
    model = OneRec(PRESETS[preset])
    optimizer = {
        "state": {
            place: {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
            for place, value in enumerate(model.parameters())
        }
    }
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps({"state": str(state)}))
    record = Checkpoint(
        step=step, cursor=Cursor(), watermark=step * 1_000, codebook_version=catalogue.version,
        items=len(catalogue.item_ids), model_config=PRESETS[preset], session_items=PRESETS[preset].session_items,
        metrics_bytes=0, score=None, counters={}, created_ms=0,
    )  # fmt: skip
    save_checkpoint(run, record, model.state_dict(), optimizer)


def timed(make: Callable[[], Outcome | None]) -> dict[str, float]:
    """One publish: seconds by step, `total` from its call to the new version's answer, `cpu` of this process."""
    began, spent = time.perf_counter(), time.process_time()
    outcome = make()
    assert outcome is not None
    return {**outcome.seconds, "total": time.perf_counter() - began, "cpu": time.process_time() - spent}


def by_command(run: Path, repository: Path, server: str) -> float:
    """Seconds of `onerec publish` as a process of its own, interpreter and imports included."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "onerec.cli", "publish", "--run", run, "--repository", repository, "--server", server,
         "--json"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - began


def requests(client: Client, engine: Engine, rounds: int) -> dict[str, float]:
    """Milliseconds a request, Triton and ONNX Runtime in turn; requests a second of eight clients at once."""
    rng = np.random.default_rng(1)
    histories = [
        [engine.snapshot.item_ids[row] for row in rng.integers(0, len(engine.snapshot.item_ids), HISTORY)]
        for _ in range(rounds)
    ]

    def bare(history: list[str]) -> None:
        engine.answer([Wanted(history=engine.history(history).codes)])

    for history in histories[:3]:
        client.recommend(history=history)
        bare(history)
    through, direct = [], []
    for history in histories:
        began = time.perf_counter()
        client.recommend(history=history)
        middle = time.perf_counter()
        bare(history)
        through.append(middle - began)
        direct.append(time.perf_counter() - middle)
    with ThreadPoolExecutor(CLIENTS) as pool:
        began = time.perf_counter()
        list(pool.map(lambda history: client.recommend(history=history), histories))
        together = time.perf_counter() - began
    return {
        "triton_ms": statistics.median(through) * 1e3,
        "onnxruntime_ms": statistics.median(direct) * 1e3,
        "overhead": statistics.median(through) / statistics.median(direct),
        "requests_per_second_8_clients": len(histories) / together,
    }


def medians(rounds: list[dict[str, float]], steps: tuple[str, ...]) -> dict[str, float]:
    """Median seconds by step, in all, and of this process' CPU."""
    return {step: statistics.median(found.get(step, 0.0) for found in rounds) for step in (*steps, "total", "cpu")}


def add_item(state: Path, name: str) -> None:
    """A new catalogue entry."""
    with Store(state, Semantics()) as store:
        store.put_items([ItemRecord(item_id=name, ts=1, duration_ms=10_000, tags=["tag"])])


def measure(preset: str, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one preset."""
    folder = scratch / preset
    state, run, repository = folder / "state", folder / "run", folder / "repository"
    repository.mkdir(parents=True)
    make_state(state, arguments.items, PRESETS[preset].codes)
    save(run, state, preset, 1)
    with TritonServer(repository, state) as server, Client(server.url, timeout=60) as client:
        load_repository(repository, client)
        rounds, items = [], []
        export = Export(run_dir=run, width=WIDTH)
        # Random weights of other seeds: one may well be worse than the one before by more than a bound.
        gate = GateConfig(enabled=False)
        with Publisher(export, repository, server=server.url, gate=gate) as publisher:
            traced = timed(publisher.publish)
            for step in range(2, 2 + arguments.rounds):
                save(run, state, preset, step)
                rounds.append(timed(publisher.publish))
                add_item(state, f"new{step}")
                items.append(timed(publisher.publish_items))
        save(run, state, preset, 99)
        command = by_command(run, repository, server.url)
        place = Repository(repository)
        engine = Engine(place.folder(place.versions()[-1]))
        asked = requests(client, engine, arguments.requests)
    totals = [found["total"] for found in rounds]
    return {
        "preset": preset,
        "parameters": sum(value.numel() for value in OneRec(PRESETS[preset]).parameters()),
        "items": arguments.items,
        "seconds": medians(rounds, STEPS),
        "items_only": medians(items, ITEM_STEPS),
        "fastest": min(totals),
        "slowest": max(totals),
        "command": command,
        "traced": traced["total"],
        "trace_alone": traced["template"],
        "times_faster": traced["total"] / statistics.median(totals),
        **asked,
    }


def show(results: list[dict[str, Any]]) -> None:
    """Tables for people."""
    console = Console(width=180)
    table = Table(title=f"seconds from a checkpoint to the first answer of the new version, {WIDTH} beams, median")
    for name in ("preset", "parameters", *STEPS, "total", "CPU", "fastest", "slowest", "`onerec publish`", "traced anew"):
        table.add_column(name, justify="left" if name == "preset" else "right")
    for found in results:
        table.add_row(
            found["preset"],
            f"{found['parameters'] / 1e6:.1f} M",
            *(f"{found['seconds'][step]:.2f}" for step in (*STEPS, "total", "cpu")),
            f"{found['fastest']:.2f}",
            f"{found['slowest']:.2f}",
            f"{found['command']:.2f}",
            f"{found['traced']:.1f} ({found['times_faster']:.0f}×)",
        )
    console.print(table)
    table = Table(title="a version that only brings new items")
    for name in ("preset", *ITEM_STEPS, "total", "CPU"):
        table.add_column(name, justify="left" if name == "preset" else "right")
    for found in results:
        table.add_row(found["preset"], *(f"{found['items_only'][step]:.2f}" for step in (*ITEM_STEPS, "total", "cpu")))
    console.print(table)
    for found in results:
        console.print(
            f"{found['preset']}: a request of {HISTORY} items takes {found['triton_ms']:.1f} ms through Triton, "
            f"{found['onnxruntime_ms']:.1f} ms in ONNX Runtime alone ({found['overhead']:.2f}×); {CLIENTS} clients at "
            f"once get {found['requests_per_second_8_clients']:.1f} requests/s"
        )


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], choices=sorted(PRESETS))
    parser.add_argument("--items", type=int, default=10_000, help="size of the catalogue")
    parser.add_argument("--rounds", type=int, default=5, help="publishes that are timed")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = [measure(preset, Path(scratch), arguments) for preset in arguments.presets]
    if arguments.json:
        print(json.dumps(results))
    else:
        show(results)


if __name__ == "__main__":
    main()
