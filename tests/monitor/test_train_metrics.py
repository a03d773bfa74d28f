"""What the trainer's metrics say is what its own records say, and saying it changes no weight."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from small_world import SETTINGS, Scrape, build_state, make_small, settings

from onerec.monitor.clock import StateClock
from onerec.monitor.metrics import Metrics
from onerec.monitor.of_train import HitRate, TrainMetrics, VersionRates
from streaming.store import Reader, Store
from trainer.checkpoint import latest_checkpoint
from trainer.evaluate import Line, read_metrics
from trainer.loop import Progress, Result, train


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_state(tmp_path_factory.mktemp("world"))


class Watched(NamedTuple):
    """A run that was watched: its folder, its result, and scrapes before the first step and after the last."""

    run: Path
    result: Result
    before: Scrape
    after: Scrape


@pytest.fixture(scope="module")
def watched(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    run = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch, Metrics("train", 0) as metrics, StateClock(state, "log") as clock:
        make_small(patch)
        watch = TrainMetrics(metrics, clock.now_ms)
        before = Scrape(metrics.address)
        result = train(state, run, settings(), progress=watch.step, saved=watch.saved)
        yield Watched(run, result, before, Scrape(metrics.address))


def event_times(state: Path) -> tuple[int, list[int]]:
    """The newest event of the state, and the times of all watches of its sessions."""
    with Reader(state) as reader:
        newest = (reader.watermark() or 0) + reader.semantics().stream.max_out_of_orderness_ms
        return newest, [item.ts for _, session in reader.sessions() for item in session.items]


def test_nothing_is_told_before_anything_is_known(watched: Watched) -> None:
    before = watched.before
    assert before["onerec_train_steps_total"] == before["onerec_pairs_total", "learnt"] == 0
    for name in ("loss", "hit_rate", "gradient_norm", "checkpoint_step", "watermark_seconds", "age_seconds_count"):
        assert not before.of(f"onerec_{name}"), name


def test_every_watch_is_aged_once_when_it_is_learnt(watched: Watched, state: Path) -> None:
    newest, times = event_times(state)
    ages = [(newest - ts) / 1000 for ts in times]
    assert watched.after["onerec_age_seconds_count", "trained"] == len(ages) > 300
    assert watched.after["onerec_age_seconds_sum", "trained"] == pytest.approx(sum(ages))
    assert watched.after["onerec_age_seconds_bucket", "43200.0", "trained"] == sum(age <= 43_200 for age in ages)
    assert watched.after["onerec_watermark_seconds", "trained"] * 1000 == watched.result.watermark


def test_steps_losses_and_checkpoints_are_the_runs_own(watched: Watched) -> None:
    lines, after = read_metrics(watched.run / "metrics.jsonl"), watched.after
    assert after["onerec_train_steps_total"] == len(lines) == watched.result.steps > 5
    assert after["onerec_train_sessions_total"] == watched.result.sessions
    assert after["onerec_skipped_steps_total"] == after["onerec_preference_steps_total"] == 0
    last = lines[-1]
    assert after.of("onerec_loss") == {("ntp",): last.loss, ("reward",): last.reward_loss}
    assert after["onerec_gradient_norm"] == last.gradient
    assert last.expert_load is not None
    assert after.of("onerec_expert_load") == {("least",): last.expert_load[0], ("most",): last.expert_load[1]}
    checkpoint = latest_checkpoint(watched.run)
    assert after["onerec_checkpoint_step"] == checkpoint.step
    assert after["onerec_checkpoint_timestamp_seconds"] * 1000 == pytest.approx(checkpoint.created_ms, abs=1)


def test_hit_rates_by_hour_add_up_to_those_of_the_run(watched: Watched) -> None:
    lines, after = read_metrics(watched.run / "metrics.jsonl"), watched.after
    scored: Counter[tuple[str, ...]] = Counter()
    hits: Counter[tuple[str, ...]] = Counter()
    for line in lines:
        hour = datetime.fromtimestamp(line.ts / 1000, UTC).strftime("%H")
        scored[(hour,)] += line.scored
        for model, scores in line.scores.items():
            hits[hour, model] += int(scores["hit@10"])
    assert after.of("onerec_scored_total") == {key: count for key, count in scored.items() if count}
    assert after.of("onerec_hits_total") == {key: count for key, count in hits.items() if scored[key[:1]]}
    assert len(after.of("onerec_scored_total")) > 2
    total, rates = scored.total(), after.of("onerec_hit_rate")
    assert rates.keys() == {("onerec",), ("popularity",), ("covisitation",)}
    for (model,), rate in rates.items():
        assert rate == pytest.approx(sum(count for (_, name), count in hits.items() if name == model) / total)


def test_watching_changes_no_byte(watched: Watched, state: Path, tmp_path: Path) -> None:
    train(state, tmp_path / "run", settings())
    mine, other = latest_checkpoint(tmp_path / "run"), latest_checkpoint(watched.run)
    assert mine.files == other.files and mine.step == other.step
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (watched.run / "metrics.jsonl").read_bytes()


def test_a_run_that_goes_on_tells_of_the_checkpoint_it_goes_on_from(watched: Watched, state: Path) -> None:
    seen: list[int] = []
    train(state, watched.run, settings(), saved=lambda checkpoint: seen.append(checkpoint.step))
    assert seen == [watched.result.steps]


def test_what_is_learnt_a_second_time_is_not_aged_again(state: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    train(state, tmp_path / "run", settings("train.backlog_passes=2", "train.score_share=0"), progress=seen.append)
    assert len(seen) > 10
    assert sorted(ts for progress in seen for ts in progress.event_ms) == sorted(event_times(state)[1])


def test_without_a_reward_model_only_good_sessions_are_learnt_and_aged(state: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    train(state, tmp_path / "run", settings("reward.train=false", "train.score_share=0"), progress=seen.append)
    with Reader(state) as reader:
        good = [item.ts for _, session in reader.sessions() if session.high_quality for item in session.items]
    assert sorted(ts for progress in seen for ts in progress.event_ms) == sorted(good)


def line(**more: object) -> Line:
    fields: dict[str, object] = {
        "step": 1, "round": 0, "sequence": 1, "ts": 0, "sessions": 1, "windows": 1, "codes": 1, "loss": 1.0, "gradient": 1.0,
        "applied": True, "expert_load": None, "scored": 0, "scores": {},
    }  # fmt: skip
    return Line(**{**fields, **more})  # type: ignore[arg-type]


def test_a_step_that_is_not_finite_leaves_no_old_loss_behind() -> None:
    from trainer.loop import PairCounts

    none = PairCounts(learnt=0, dropped=0, stale=0, early=0, other_codebook=0)
    with Metrics("train", 0) as metrics:
        watch = TrainMetrics(metrics, lambda seen: seen)
        for found in (line(), line(loss=None, gradient=None, applied=False)):
            watch.step(Progress(line=found, sessions=1, log_sessions=1, sessions_per_second=1.0, watermark=None, event_ms=[],
                                pairs=none, pair_ms=[]))
        after = Scrape(metrics.address)
    assert after["onerec_skipped_steps_total"] == 1 and not after.of("onerec_loss") and not after.of("onerec_gradient_norm")


def test_the_rolling_hit_rate_forgets_whole_batches_beyond_its_windows() -> None:
    rate = HitRate(windows=10)
    assert rate.rates() == {}
    for hits in (4.0, 0.0, 2.0, 2.0):
        rate.add(4, {"onerec": hits})
    # 16 windows: without the first batch there are still more than ten, without the second too few.
    assert rate.rates() == {"onerec": 4 / 12}


def test_a_version_is_judged_by_what_was_scored_until_the_next_and_too_little_waits() -> None:
    versions = VersionRates(windows=10)
    versions.add(50, 50.0)  # before the first checkpoint: of no version
    versions.checkpoint()
    versions.add(10, 1.0)
    assert versions.rates == []
    versions.checkpoint()
    assert versions.rates == [0.1]
    versions.add(9, 0.0)
    versions.checkpoint()
    assert versions.rates == [0.1]
    versions.add(1, 5.0)
    versions.checkpoint()
    versions.add(20, 20.0)
    assert versions.rates == [0.1, 0.5]
    versions.checkpoint()
    assert versions.rates == [0.5, 1.0]


def test_the_state_clock_is_the_newest_event_or_the_wall_clock(state: Path) -> None:
    newest, _ = event_times(state)
    wall, mono = [newest + 5_000], [0.0]

    def clock(mode: str) -> StateClock:
        return StateClock(state, mode, wall_ms=lambda: wall[0], monotonic=lambda: mono[0])  # type: ignore[arg-type]

    with clock("live") as live, clock("log") as log, clock("auto") as auto:
        assert (live.now_ms(), log.now_ms(), auto.now_ms()) == (newest + 5_000, newest, newest + 5_000)
        wall[0] += 2 * 3_600_000
        mono[0] += 5
        assert auto.now_ms() == newest


def test_the_state_clock_looks_again_after_a_second_or_where_it_is_known_to_be_behind(tmp_path: Path) -> None:
    wall = [0]
    mono = [0.0]
    with Store(tmp_path / "state", settings().semantics) as store:
        late = settings().stream.max_out_of_orderness_ms
        with StateClock(tmp_path / "state", "log", wall_ms=lambda: wall[0], monotonic=lambda: mono[0]) as clock:
            assert clock.now_ms() is None
            for step, (after, seen, known) in enumerate([(0.5, None, False), (0.6, None, True), (0.1, 10**12, True)]):
                store.append([], {}, watermark=10**12 + step * 1_000)
                mono[0] += after
                found = clock.now_ms(seen if seen is None else seen + late + step * 1_000)
                assert found == (10**12 + step * 1_000 + late if known else None)


PROGRAM = "import pytest, small_world; small_world.make_small(pytest.MonkeyPatch()); from onerec.cli import main; main()"


@pytest.mark.slow
def test_the_command_keeps_its_metrics_until_they_are_read(state: Path, tmp_path: Path) -> None:
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    command = ["train", "--state", str(state), "--run", str(tmp_path / "run"), "--metrics-port", "0", "--json", *options]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as process:
        assert process.stderr is not None
        said = iter(process.stderr.readline, "")
        found = next(match[1] for text in said if (match := re.search(r"stay on http://([\d.:]+)/metrics", text)))
        scrape = Scrape(found)
        assert process.wait(timeout=30) == 0
    assert scrape["onerec_recovery_seconds"] > 0
    assert scrape["onerec_train_sessions_total"] == latest_checkpoint(tmp_path / "run").counters["sessions"]
