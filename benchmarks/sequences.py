"""Item sequences of KuaiRand-Pure for `onerec import sequences`: long watches in order, each item once.

    ONEREC_DATA=…/kuairand-pure python benchmarks/sequences.py OUT.txt [--users 2000] [--seed 0] [--check]
    python benchmarks/sequences.py OUT.txt --planted

A user's line: the long watches of his earlier history, then those of the nine days of events; an item stays where it was
first, as in the published files; users with fewer than five items are left out, a seeded sample of `--users` is kept.
Prints counts. `--check` then fits SASRec of RecTools (`pip install 'rectools[torch]'`) on the same split, to compare with
`onerec leave-one-out`. `--planted` needs no data: 300 users walk along a random permutation of 60 items, and one step in
ten goes anywhere. The file of the log is made of the data, so it falls under its licence (CC BY-SA
4.0).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from trainer.baselines.fitting import ranks
from trainer.leave_one_out import scores
from trainer.sequences import Dataset, import_sequences

LEAST = 5


def long_watches(data: Path) -> dict[str, list[str]]:
    """Distinct items of each user, oldest first."""
    found: dict[str, dict[str, None]] = {}
    for path in data.glob("history_before_*.jsonl.gz"):
        with gzip.open(path, "rt") as lines:
            for line in lines:
                record = json.loads(line)
                found[str(record["user_id"])] = dict.fromkeys(map(str, record["long_watch_seq"]))
    for path in sorted(data.glob("events_*.csv.gz")):
        with gzip.open(path, "rt", newline="") as lines:
            for row in csv.DictReader(lines):  # the file is in order of time
                if row["long_view"] == "1":
                    found.setdefault(row["user_id"], {}).setdefault(row["video_id"], None)
    return {user: list(items) for user, items in found.items() if len(items) >= LEAST}


def planted(seed: int) -> dict[str, list[str]]:
    """Walks of 1 to 11 items, nine steps in ten to the one follower of an item."""
    rng = np.random.default_rng(seed)
    follower = rng.permutation(60)
    found = {}
    for user in range(300):
        item, walk = int(rng.integers(60)), []
        for _ in range(rng.integers(1, 12)):
            walk.append(f"i{item}")
            item = int(follower[item]) if rng.random() < 0.9 else int(rng.integers(60))
        found[f"u{user}"] = walk
    return found


def sample(users: int, seed: int) -> dict[str, list[str]]:
    """Long watches of some users of the log that ONEREC_DATA names."""
    data = os.environ.get("ONEREC_DATA")
    if not data:
        sys.exit("set ONEREC_DATA to the folder of KuaiRand-Pure (events_*.csv.gz, history_before_*.jsonl.gz)")
    every = long_watches(Path(data))
    names = sorted(every)
    chosen = np.random.default_rng(seed).choice(len(names), min(users, len(names)), replace=False)
    return {names[place]: every[names[place]] for place in sorted(chosen)}


def rectools_sasrec(dataset: Dataset, epochs: int, seed: int) -> dict[str, float]:
    """HR and NDCG of RecTools' SASRec (softmax over the catalogue, 64 wide) on the test items."""
    import pandas as pd
    import torch
    from rectools import Columns
    from rectools.dataset import Dataset as Interactions
    from rectools.models import SASRecModel

    torch.manual_seed(seed)

    def frame(rows: list[list[int]]) -> pd.DataFrame:
        entries = [(user, item, 1.0, place) for user, row in enumerate(rows) for place, item in enumerate(row)]
        table = pd.DataFrame(entries, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime])
        return table.assign(**{Columns.Datetime: pd.to_datetime(table[Columns.Datetime], unit="s")})

    model = SASRecModel(
        n_blocks=2, n_heads=2, n_factors=64, dropout_rate=0.2, session_max_len=50, lr=1e-3, batch_size=128, epochs=epochs,
        loss="softmax", deterministic=True,
    )
    model.fit(Interactions.construct(frame(dataset.training())))
    test = dataset.test()
    told = Interactions.construct(frame(test.histories))
    users = np.arange(len(test.targets))
    best = model.recommend(users=users, dataset=told, k=10, filter_viewed=False, on_unsupported_targets="ignore")
    log_probs = np.full((len(users), len(dataset.items)), -np.inf)
    log_probs[best[Columns.User].to_numpy(), best[Columns.Item].to_numpy()] = -best[Columns.Rank].to_numpy()
    return scores(ranks(log_probs, test.targets))


def main() -> None:
    """Write the file; compare when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--planted", action="store_true", help="a made-up file with a known best")
    parser.add_argument("--check", action="store_true", help="fit RecTools' SASRec on the same split")
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 20], help="of RecTools' SASRec, one row each")
    options = parser.parse_args()
    kept = planted(options.seed) if options.planted else sample(options.users, options.seed)
    options.out.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in kept.items()), encoding="utf-8")
    lengths = [len(items) for items in kept.values()]
    items = {item for row in kept.values() for item in row}
    print(f"{len(kept):,} users, {len(items):,} items, {sum(lengths):,} in all, median {np.median(lengths):.0f} a user")
    if options.check:
        dataset = import_sequences(options.out, levels=1, size=1)
        for epochs in options.epochs:
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as work:
                os.chdir(work)  # Lightning writes its logs where it stands
                found = rectools_sasrec(dataset, epochs, options.seed)
            print(f"RecTools SASRec, softmax, {epochs} epochs: "
                  + ", ".join(f"{name} {value:.4f}" for name, value in found.items()) + f", {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
