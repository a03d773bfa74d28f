"""The catalogue of the KuaiRand log: balanced, complete, and better than chance about the days after the fit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from onerec.config import load_config
from streaming.item_files import read_items
from streaming.replay import Replay
from streaming.store import Reader, Store
from trainer.items import build_catalogue

FITTED_UNTIL = 1_651_200_000_000


@pytest.mark.slow
def test_codes_fitted_on_the_first_days_bring_together_what_is_watched_together_on_the_last(tmp_path):
    if not os.environ.get("ONEREC_DATA"):
        pytest.skip("ONEREC_DATA does not name the folder of the KuaiRand log")
    data = Path(os.environ["ONEREC_DATA"])
    config = load_config(None, ["session.gap_ms=43200000", "session.min_watched=3", "session.min_interactions=0",
                                "session.min_total_watch_ms=30000"])
    with Store(tmp_path, config.semantics) as store:
        for batch in read_items(str(data / "videos.csv.gz"), [], None):
            store.put_items(batch)
        Replay(store, [str(data / name) for name in ("history_before_20220425.jsonl.gz",
                                                     "events_20220425-20220503.csv.gz")]).run()
    with Reader(tmp_path) as reader:
        catalogue = build_catalogue(tmp_path, reader, config, until=FITTED_UNTIL)
        pairs = []
        for _, session in reader.sessions():
            if session.start > FITTED_UNTIL:
                rows = [catalogue.index[item.item_id] for item in session.items if item.effective]
                pairs += [pair for pair in zip(rows, rows[1:], strict=False) if pair[0] != pair[1]]
    assert len(catalogue.item_ids) == 7583 and not catalogue.left_out
    for level in catalogue.item_codes[catalogue.fitted].T:
        loads = np.bincount(level, minlength=catalogue.codes)
        assert loads.max() - loads.min() <= 1
    first, second = np.array(pairs).T
    shuffled = np.random.default_rng(0).permutation(second)
    codes = catalogue.item_codes[:, 0]
    together = (codes[first] == codes[second]).mean()
    by_chance = (codes[first] == codes[shuffled])[first != shuffled].mean()
    assert together > 3 * by_chance
