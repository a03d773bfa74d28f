"""What the preference sampler gives and costs, and what it takes from the trainer's speed (paper §5.3.1).

    python benchmarks/sampler.py                 # about 3 minutes on 2 quiet cores
    python benchmarks/sampler.py --quick         # fewer sessions: is everything in its place?
    python benchmarks/sampler.py --json

1. One core, preset `tiny`, 128 sessions a request: pairs and sessions a CPU second of beam search and reward model.
2. The same log is trained on one core four times, from the same checkpoint on: next-token prediction only; with the reward
   model; with a sampler on the other core at r = 1 %; and at r = 5 %. The trainer's speed is `onerec train`'s own, without
   its start; CPU seconds are those of both processes without their start. Speeds of a second need a quiet machine, those
   of a CPU second less so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from trainer.checkpoint import latest_checkpoint
from trainer.config import PreferenceConfig, RewardConfig, RewardModelConfig
from trainer.model import OneRec
from trainer.pairs import Pair
from trainer.presets import preset
from trainer.reward import RewardModel
from trainer.sampler_stats import read_stats, stats_path
from trainer.sampling import PairMaker, Request

ITEMS = 20_000
BATCH = 8
TRAIN = ["train.threads=1", "train.checkpoint_sessions=512", "train.score_share=0", "train.precision=fp32"]
MODES = {
    "NTP only": ["reward.train=false", "preference.ratio=0"],
    "with reward model": ["preference.ratio=0"],
    "r = 1 %": ["preference.ratio=0.01"],
    "r = 5 %": ["preference.ratio=0.05"],
}


def search_speed(seconds: float) -> dict[str, float]:
    """Pairs and generated sessions a CPU second, histories of 5 to 60 items, a catalogue of 20,000."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = OneRec(preset("tiny", levels=3, codes=256, session_items=5))
    maker = PairMaker(
        model, RewardModel(RewardModelConfig()), rng.integers(0, 256, (ITEMS, 3)).astype(np.int32),
        PreferenceConfig(min_margin=0.0), RewardConfig(), snapshot_step=0, snapshot_version=0, codebook_version="",
    )
    pairs = generated = 0
    began = end = time.process_time()
    while end - began < seconds:
        requests = [
            Request(str(i), i, rng.integers(0, ITEMS, rng.integers(5, 61)).astype(np.int32)) for i in range(BATCH)
        ]
        records, count = maker.make_counted(requests)
        pairs, generated = pairs + sum(isinstance(record, Pair) for record in records), generated + count
        end = time.process_time()
    return {"pairs_per_cpu_second": pairs / (end - began), "sessions_per_cpu_second": generated / (end - began)}


def onerec(*words: str | Path) -> None:
    """A command of ours, to its end."""
    subprocess.run([sys.executable, "-m", "onerec.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


def started(core: int, *words: str | Path, settings: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """The command on one core; its summary comes to `log`."""
    options = [part for setting in settings for part in ("--set", setting)]
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "onerec.cli", *map(str, words), "--json", *options],
            stdout=out, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=partial(os.sched_setaffinity, 0, {core}),
        )


def summary(log: Path) -> dict[str, Any]:
    """The last line that a command printed."""
    return json.loads(log.read_bytes().splitlines()[-1])


def make_state(folder: Path, users: int, days: int) -> Path:
    """A simulated world's log with its catalogue."""
    onerec("simulate", "--out", folder / "world.jsonl", "--users", str(users), "--items", "2000", "--days", str(days))
    state = folder / "state"
    onerec("replay", folder / "world.jsonl", "--items", folder / "world.items.jsonl", "--state", state, "--flush")
    onerec("items", "--state", state)
    return state


def measure(state: Path, run: Path, settings: Sequence[str], cores: tuple[int, int], sampled: bool) -> dict[str, Any]:
    """Train the rest of the log, with a sampler beside it where `sampled`."""
    before = latest_checkpoint(run).counters
    sampler = None
    if sampled:
        log = run / "sampler.log"
        sampler = started(cores[1], "sampler", "--state", state, "--run", run, "--follow", settings=settings, log=log)
        deadline = time.monotonic() + 60
        while not stats_path(run).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    try:
        trainer = started(cores[0], "train", "--state", state, "--run", run, settings=[*TRAIN, *settings], log=run / "log")
        if trainer.wait(900):
            raise SystemExit(f"onerec train ended with {trainer.returncode}")
    finally:
        if sampler is not None:
            sampler.send_signal(signal.SIGTERM)
            sampler.wait(60)
    result = summary(run / "log")
    after = latest_checkpoint(run).counters
    cpu_seconds = (after["cpu_ms"] - before["cpu_ms"]) / 1000
    found: dict[str, Any] = {
        "sessions": result["new_sessions"],
        "sessions_per_cpu_second": result["new_sessions"] / cpu_seconds,
        "trainer_sessions_per_second": result["sessions_per_second"],
        "trainer_cpu_seconds": cpu_seconds,
        "pairs_learnt": after.get("pairs_learnt", 0),
        "pairs_stale": after.get("pairs_stale", 0),
    }
    stats = read_stats(stats_path(run))
    if stats is not None:
        found |= {
            "pairs": stats.pairs, "drops": stats.drops, "sampler_cpu_seconds": stats.cpu_seconds,
            "compute_share": stats.cpu_seconds / cpu_seconds,
            "sampler_pairs_per_second": stats.pairs_per_second,
            "versions_behind_mean": stats.versions_behind_mean, "versions_behind_max": stats.versions_behind_max,
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    console = Console(stderr=asked.json, width=110)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("benchmarks/sampler.py: the sampler needs a core of its own; give the process two")
    users, days = (250, 2) if asked.quick else (1000, 3)
    found: dict[str, Any] = {"search": search_speed(3.0 if asked.quick else 10.0)}
    console.print(
        "tiny, N = 128: {pairs_per_cpu_second:.2f} pairs, {sessions_per_cpu_second:.0f} sessions generated a CPU second"
        .format(**found["search"]), highlight=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        state = make_state(Path(folder), users, days)
        # The seed that all go on from: the first two fifths of the log.
        seeds = {}
        for name in ("NTP only", "with reward model"):
            seeds[name] = Path(folder) / f"seed of {name}"
            _train_part(state, seeds[name], [*TRAIN, *MODES[name]], 0.4)
        table = Table(title="the rest of the log, trainer on one core")
        for column in ("", "sessions/s", "of NTP", "a CPU s", "of NTP", "sampler/trainer CPU", "pairs", "learnt", "behind"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for name, settings in MODES.items():
            run = Path(folder) / name
            shutil.copytree(seeds["NTP only" if name == "NTP only" else "with reward model"], run)
            row = found[name] = measure(state, run, settings, (cores[0], cores[1]), "ratio=0.0" in settings[-1])
            console.print(name, json.dumps(row), highlight=False, soft_wrap=True)
            base = found["NTP only"]
            row["of_ntp_only"] = row["trainer_sessions_per_second"] / base["trainer_sessions_per_second"]
            row["of_ntp_only_cpu"] = row["sessions_per_cpu_second"] / base["sessions_per_cpu_second"]
            table.add_row(
                name, f"{row['trainer_sessions_per_second']:.1f}", f"{row['of_ntp_only']:.2f}",
                f"{row['sessions_per_cpu_second']:.1f}", f"{row['of_ntp_only_cpu']:.2f}", *(
                    (f"{row['compute_share']:.2f}", str(row["pairs"]), str(row["pairs_learnt"]),
                     f"{row['versions_behind_mean'] or 0:.1f}") if "pairs" in row else ("–",) * 4
                ),
            )
        console.print(table)
    if asked.json:
        print(json.dumps(found))


def _train_part(state: Path, run: Path, settings: Sequence[str], share: float) -> None:
    """Train the first part of a log, in this process."""
    from onerec.config import load_config
    from streaming.store import Reader
    from trainer.loop import train

    with Reader(state) as reader:
        wanted = share * reader.counters().high_quality
    learnt = [0]
    train(state, run, load_config(None, list(settings)), stopped=lambda: learnt[0] >= wanted,
          progress=lambda progress: learnt.__setitem__(0, progress.sessions))


if __name__ == "__main__":
    main()
