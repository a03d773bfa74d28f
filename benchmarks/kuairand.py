"""Test-then-train on KuaiRand-Pure: OneRec against popularity and last-item co-visitation.

    ONEREC_DATA=…/kuairand-pure python benchmarks/kuairand.py [--work DIR] [--only default|tuned] [--plot FILE]

Replays nine days of the log, fits the semantic IDs on the first seven and trains on them, then goes on through the
last two: every session is scored with the weights of that moment, then learnt. `default` are the trainer's defaults,
each session once; `tuned` says below what it changes. Prints a Markdown table; writes the curve of the last run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

from streaming.store import Reader
from trainer.baselines import Popularity
from trainer.curves import draw
from trainer.data import session_examples
from trainer.evaluate import RANKED, Line, Scores, add, mean_loss, means, rank_scores, read_metrics, session_scores
from trainer.items import load_catalogue

TEST_BEGINS = datetime(2022, 5, 2, tzinfo=timezone(timedelta(hours=8)))
SEMANTICS = ["session.gap_ms=43200000", "session.min_watched=3", "session.min_total_watch_ms=30000",
             "session.min_interactions=0"]
BEGINS_MS = int(TEST_BEGINS.timestamp() * 1000)
TUNED_CODEBOOK = ["catalogue.levels=2", "catalogue.codes=1024"]
TUNED = ["train.learning_rate=0.001", "train.batch_windows=16", "train.backlog_passes=2",
         f"train.backlog_until_ms={BEGINS_MS}"]
HALF_LIFE = 1_000
ROWS = ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10", "session_hit", "session_recall", "session_ndcg", "best_recall")


def onerec(*words: str) -> float:
    """Run a command of `onerec` as a user would; returns its seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "onerec.cli", *words], check=True, stdout=sys.stderr)
    return time.monotonic() - began


def sets(settings: list[str]) -> list[str]:
    """The settings as `--set` options."""
    return [word for setting in settings for word in ("--set", setting)]


def table(columns: dict[str, Scores]) -> str:
    """A Markdown table of metrics by recommender."""
    head = f"| before learning it | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}"
    rows = [
        f"| {metric} | " + " | ".join(f"{c[metric]:.4f}" if metric in c else "–" for c in columns.values()) + " |"
        for metric in ROWS
    ]
    return "\n".join([head, *rows])


def tested(lines: list[Line]) -> list[Line]:
    """The batches whose newest window lies in the last two days."""
    return [line for line in lines if line.ts >= BEGINS_MS and line.scored]


def main() -> None:
    """Replay, fit, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder to keep state and runs in (default: a temporary one)")
    parser.add_argument("--only", choices=["default", "tuned"], help="one of the two runs")
    parser.add_argument("--plot", type=Path, default=Path("docs/kuairand.png"))
    options = parser.parse_args()
    data = os.environ.get("ONEREC_DATA")
    if not data:
        sys.exit("set ONEREC_DATA to the folder of KuaiRand-Pure (events_*.csv.gz, history_before_*.jsonl.gz, videos.csv.gz)")
    with tempfile.TemporaryDirectory() as temporary:
        columns = measure(Path(data), options.work or Path(temporary), options.only, options.plot)
        print(f"test from {TEST_BEGINS.astimezone(UTC):%Y-%m-%d %H:%M} UTC\n\n{table(columns)}")


def fading_popularity(state: Path, lines: list[Line]) -> Scores:
    """Popularity whose counts halve every `HALF_LIFE` windows, on the same windows, in the same batches."""
    popularity, total, scored = Popularity(half_life=HALF_LIFE), Scores(), 0
    catalogue, fresh = load_catalogue(state), [line for line in lines if line.round == 0 or line.scored]
    with Reader(state) as reader:
        semantics = reader.semantics()
        m, n = semantics.session.target_items, semantics.history.length
        sessions = reader.sessions()
        read = 0
        for line in fresh:
            batch = []
            part = itertools.islice(sessions, line.sequence - read)
            for read, session in part:  # noqa: B007
                if session.high_quality:
                    batch += session_examples(session, catalogue.index, len(catalogue.index), m=m, n=n, fresh=True,
                                              counts=Counter())
            for example in batch if tested([line]) else []:
                if example.scored:
                    ranked, targets = popularity.rank(RANKED), example.targets.tolist()
                    add(total, rank_scores(ranked, targets[0]))
                    add(total, session_scores(ranked[:m], targets))
                    scored += 1
            for example in batch:
                popularity.observe(example.targets.tolist())
    return {name: value / scored for name, value in total.items()}


def prepare(data: Path, state: Path, codebook: list[str]) -> float:
    """Replay the log and fit the semantic IDs on what was known when the test begins; returns the seconds."""
    logs = [*data.glob("history_before_*.jsonl.gz"), *data.glob("events_*.csv.gz")]
    seconds = onerec("replay", *map(str, logs), "--format", "kuairand", "--items", str(data / "videos.csv.gz"),
                     "--state", str(state), *sets(SEMANTICS))
    return seconds + onerec("items", "--state", str(state), "--until", str(BEGINS_MS), *sets(codebook))


def measure(data: Path, work: Path, only: str | None, plot: Path) -> dict[str, Scores]:
    """Metrics by column; each run has a state and a codebook of its own."""
    columns: dict[str, Scores] = {}
    for name, codebook, settings in (("default", [], []), ("tuned", TUNED_CODEBOOK, TUNED)):
        if only not in (None, name):
            continue
        state, run = work / f"{name}-state", work / f"{name}-run"
        prepared = 0.0 if (state / "catalogue").exists() else prepare(data, state, codebook)
        trained = onerec("train", "--state", str(state), "--run", str(run), *sets([*settings, "train.score_share=1"]))
        lines = tested(read_metrics(run / "metrics.jsonl"))
        windows, scores = means(lines)
        columns |= {f"popularity, {name}": scores["popularity"], f"co-visitation, {name}": scores["covisitation"]}
        columns[f"fading popularity, {name}"] = fading_popularity(state, read_metrics(run / "metrics.jsonl"))
        columns[f"OneRec {name}"] = scores["onerec"]
        print(f"{name}: replay and semantic IDs {prepared:.0f} s, training and scoring {trained:.0f} s; {windows:,} "
              f"windows of the last two days scored, loss {mean_loss(lines):.3f} nats a code; {[*codebook, *settings]}",
              flush=True)
        draw(read_metrics(run / "metrics.jsonl"), plot, mark=BEGINS_MS,
             title=f"KuaiRand-Pure, {name}: scored before it is learnt (UTC)")
    return columns


if __name__ == "__main__":
    main()
