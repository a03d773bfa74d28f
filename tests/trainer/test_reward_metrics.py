"""AUC, calibration and lift against figures computed by hand, and the command that shows them."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from onerec.cli import build
from onerec.errors import Failure, UserError
from trainer.reward_log import PREDICTION, REWARDS_FILE
from trainer.reward_metrics import by_time, calibration, draw, lift, soft_auc, tower_metrics


def rows_of(count, seed=0, signal=True):
    """Windows whose labels are drawn by their predictions; without `signal`, of others'."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, PREDICTION)
    rows["ts"] = rng.permutation(count) * 1000
    rows["prediction"] = rng.beta(1, 3, (count, 4))
    chance = rows["prediction"] if signal else rng.permutation(rows["prediction"])
    rows["label"] = rng.random((count, 4)) < chance
    return rows


def test_auc_of_hard_labels_is_the_usual_one():
    rows = rows_of(300)
    predictions, labels = rows["prediction"][:, 0], rows["label"][:, 0]
    assert soft_auc(predictions, labels) == pytest.approx(roc_auc_score(labels, predictions))


def test_auc_of_soft_labels_by_hand():
    predictions, labels = np.array([0.1, 0.5, 0.9]), np.array([0.0, 0.5, 1.0])
    # Positives: 0.5 with weight 0.5, 0.9 with weight 1; negatives: 0.1 with weight 1, 0.5 with weight 0.5. Of 2.25 weight
    # in pairs only the tie of 0.5 with itself, 0.25, counts half.
    assert soft_auc(predictions, labels) == pytest.approx((2.25 - 0.125) / 2.25)
    assert soft_auc(-predictions, labels) == pytest.approx(0.125 / 2.25)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_labels_of_one_kind_have_no_auc_and_no_correlation(label):
    metrics = tower_metrics(np.array([0.1, 0.2, 0.3]), np.full(3, label))
    assert metrics.auc is None and metrics.correlation is None
    assert (metrics.lift is None) == (label == 0)


def test_calibration_groups_are_equally_large_and_in_order_of_the_prediction():
    rng = np.random.default_rng(0)
    predictions = rng.random(1003)
    curve = calibration(predictions, predictions)
    assert curve[:, 2].sum() == 1003 and np.ptp(curve[:, 2]) <= 1
    assert (np.diff(curve[:, 0]) > 0).all()
    assert np.allclose(curve[:, 0], curve[:, 1])


def test_ece_is_the_shift_of_a_shifted_prediction():
    labels = np.tile([0.2, 0.4, 0.6, 0.8], 100)
    assert tower_metrics(labels, labels).ece == pytest.approx(0, abs=1e-12)
    assert tower_metrics(labels + 0.1, labels).ece == pytest.approx(0.1)


def test_lift_by_hand():
    labels = np.zeros(100)
    labels[:5] = 1
    ranked = np.linspace(1, 0, 100)
    assert lift(ranked, labels) == pytest.approx(10)  # 5 of 10 against 5 of 100
    assert lift(-ranked, labels) == 0


def test_a_constant_prediction_is_chance():
    metrics = tower_metrics(np.full(40, 0.3), np.tile([0.0, 1.0], 20))
    assert metrics.auc == pytest.approx(0.5) and metrics.correlation is None


def test_time_bins_hold_every_window_once_in_event_time_order():
    rows = rows_of(100)
    groups = by_time(rows, 7)
    assert sum(group.windows for group in groups) == 100
    assert all(first.end < second.begin for first, second in zip(groups, groups[1:], strict=False))
    assert groups[0].begin == 0 and groups[-1].end == 99_000
    first = rows[rows["ts"] <= groups[0].end]
    assert groups[0].towers["ltr"].base_rate == pytest.approx(first["label"][:, 3].mean())


def test_fewer_windows_than_bins_make_fewer_bins():
    assert [group.windows for group in by_time(rows_of(3), 8)] == [1, 1, 1]


def run_command(run, *more):
    return CliRunner().invoke(build(), ["reward", "--run", str(run), *more])


def test_the_command_tells_a_good_model_from_chance_and_draws(tmp_path):
    found = {}
    for name, signal in (("good", True), ("chance", False)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / REWARDS_FILE).write_bytes(rows_of(4000, signal=signal).tobytes())
        result = run_command(folder, "--json", "--bins", "3", "--plot", str(tmp_path / f"{name}.png"))
        assert result.exit_code == 0, result.output
        found[name] = json.loads(result.stdout)
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    for tower in ("swt", "vtr", "wtr", "ltr"):
        good, chance = (found[name]["towers"][tower] for name in ("good", "chance"))
        assert good["auc"] > 0.65 and good["ece"] < 0.03 and good["lift"] > 1.5
        assert abs(chance["auc"] - 0.5) < 0.05 and chance["ece"] > 0.1
    assert [group["windows"] for group in found["good"]["bins"]] == [1334, 1333, 1333]
    shown = run_command(tmp_path / "good").output
    assert "AUC" in shown and "top decile" in shown


def test_predictions_that_are_no_numbers_are_counted_not_averaged(tmp_path):
    rows = rows_of(50)
    rows["prediction"][:5, 2] = np.nan
    (tmp_path / REWARDS_FILE).write_bytes(rows.tobytes())
    result = json.loads(run_command(tmp_path, "--json").stdout)
    assert result["windows"] == 45 and result["not_finite"] == 5
    assert result["towers"]["swt"]["auc"] is not None
    assert "5 windows" in run_command(tmp_path).output


def test_a_run_without_predictions_is_refused_with_the_remedy(tmp_path):
    result = run_command(tmp_path)
    assert isinstance(result.exception, UserError) and "reward.train" in str(result.exception)


def test_a_plot_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / REWARDS_FILE).write_bytes(rows_of(20).tobytes())
    result = run_command(tmp_path, "--plot", str(tmp_path / "missing" / "x.png"))
    assert isinstance(result.exception, UserError) and "make it first" in str(result.exception)
    with pytest.raises(Failure, match="writable"):
        draw(rows_of(20), tmp_path / "x.unknown")
