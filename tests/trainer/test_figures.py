"""Figures of the paper and of online learning: what they compare is comparable, on the smallest worlds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.data import Example

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed packages

from benchmarks import figures, online, seed_models  # noqa: E402


def quiet(text: str) -> None:
    pass


def test_share_of_the_gain_is_exact_where_every_case_gains_alike() -> None:
    base = np.random.default_rng(1).random(50)
    share, low, high = figures.share_of_gain(base, base + 0.03, base + 0.04)
    assert share == pytest.approx(0.75) and low == pytest.approx(0.75) and high == pytest.approx(0.75)


def test_the_interval_of_a_share_holds_it_and_widens_with_noise() -> None:
    rng = np.random.default_rng(2)
    base, gain = rng.random(200), rng.normal(0.05, 0.05, 200)
    widths = []
    for noise in (0.01, 0.1):
        share, low, high = figures.share_of_gain(base, base + 0.5 * gain + rng.normal(0, noise, 200), base + gain)
        assert low < share < high
        widths.append(high - low)
    assert widths[0] < widths[1]


def test_batches_hold_whole_sessions_in_order_and_end_with_the_day() -> None:
    rng = np.random.default_rng(3)
    rows = np.arange(2, dtype=np.int32)
    sessions = [
        online.Heard([Example(str(number), 0, rows, rows, True, True)] * int(rng.integers(1, 6)), number // 20, None)
        for number in range(60)
    ]
    found = online.batches(sessions, 8)
    assert [heard for group in found for heard in group] == sessions
    for group, after in zip(found, [*found[1:], None], strict=True):
        assert len({heard.day for heard in group}) == 1
        windows = [len(heard.examples) for heard in group]
        assert sum(windows[:-1]) < 8
        assert sum(windows) >= 8 or after is None or after[0].day > group[0].day


@pytest.mark.slow
def test_the_figures_of_alignment_and_size_are_made_from_one_world(tmp_path: Path) -> None:
    ground = seed_models.TRIAL
    ratios = (0.0, 0.01, 0.05, 0.5)
    aligned = figures.r_dpo(ground, 1, tmp_path, quiet, ratios)
    pairs = [point["pairs"] for point in aligned["points"] if point["r_dpo"] is not None]
    assert pairs[0] == 0 <= pairs[1] <= pairs[2] < pairs[3]
    assert aligned["points"][0]["true"] != aligned["points"][4]["true"]
    for point in aligned["points"]:
        for by in ("true", "modelled"):
            assert all(0 <= values["mean"] <= values["max"] <= 1 for values in point[by].values())

    seen = figures.codes(ground, 1, tmp_path, quiet, {"before": None, "after": 0.5})
    for when in ("before", "after"):
        for level, star in enumerate(seen["shown"]["star"]):
            probabilities = np.array(seen["shown"]["probabilities"][when][level])
            assert probabilities.sum() == pytest.approx(1) and 0 <= star < len(probabilities)
        assert all(0 < entropy <= np.log(seen["codes"]) for entropy in seen["means"][when]["entropy"])
    assert seen["means"]["before"] != seen["means"]["after"]

    grown = figures.scaling(ground, 1, tmp_path, quiet, passes=2)
    sizes = [point["parameters"] for point in grown["points"]]
    assert sizes == sorted(set(sizes)) and all(len(point["test_loss"]) == 2 for point in grown["points"])
    assert all(point["test_loss"][1] < np.log(seen["codes"]) for point in grown["points"])

    for name, record in (("r-dpo", aligned), ("codes", seen), ("scaling", grown)):
        _, draw, table = figures.FIGURE_OF[name]
        draw(record, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and table(record).startswith("| ")


@pytest.mark.slow
def test_online_arms_are_one_model_on_the_second_day_and_answer_the_same_cases(tmp_path: Path) -> None:
    record = online.measure(online.TRIAL, 1, tmp_path, quiet)
    arms = record["arms"]
    for name in ("hr@10", "watch_s"):
        assert arms["daily"][name][0] == arms["retrained"][name][0] == arms["frozen"][name][0]
    assert arms["frozen"]["watch_s"][-1] != arms["daily"]["watch_s"][-1]
    assert arms["frozen"]["learning_s"] == 0 < arms["continuous"]["learning_s"]
    assert arms["continuous"]["continuous_minus_this"] == [0, 0]
    online.draw(record, tmp_path / "online.png")
    assert (tmp_path / "online.png").stat().st_size > 10_000 and online.table(record).startswith("| ")
