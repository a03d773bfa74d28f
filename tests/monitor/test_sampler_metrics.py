"""What the sampler's metrics say is what stands in the pair log; pairs are followed until the trainer has learnt them."""

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from small_world import Scrape, build_state, make_small, settings

from onerec.errors import UserError
from onerec.monitor.clock import StateClock
from onerec.monitor.metrics import Metrics
from onerec.monitor.of_sampler import SamplerMetrics
from onerec.monitor.of_train import TrainMetrics
from streaming.store import Reader
from trainer.checkpoint import (
    STATE_FILE,
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer,
    load_reward_weights,
    load_weights,
    newest_version,
    save_checkpoint,
)
from trainer.evaluate import read_metrics
from trainer.journal import Journal
from trainer.loop import train
from trainer.pairs import Pair, PairReader, Record, decode_record, encode_record, pairs_path
from trainer.sampler import sample
from trainer.sampler_stats import Stats


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A state, and a run that has learnt about half of it."""
    state, run = build_state(tmp_path_factory.mktemp("world")), tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        steps: list[object] = []
        train(state, run, settings(), progress=steps.append, stopped=lambda: len(steps) >= 5)
    yield state, run


def records(run: Path) -> list[Record]:
    with PairReader(pairs_path(run)) as reader:
        return reader.read(0, 1_000)


def test_pairs_are_counted_and_aged_when_written_and_again_when_learnt(trained: tuple[Path, Path], tmp_path: Path) -> None:
    state, run = trained[0], Path(shutil.copytree(trained[1], tmp_path / "run"))
    with Metrics("sampler", 0) as metrics, StateClock(state, "log") as clock:
        watch = SamplerMetrics(metrics, clock.now_ms, partial(newest_version, run))
        before = Scrape(metrics.address)
        # A queue of six: what is older is passed over.
        sample(state, run, settings(), queue=6, wrote=watch.wrote, progress=watch.progress)
        after = Scrape(metrics.address)
        now = clock.now_ms()
    assert now is not None
    assert set(before.of("onerec_pairs_total").values()) == {0} and not before.of("onerec_pairs_unread")
    found = records(run)
    pairs = [record for record in found if isinstance(record, Pair)]
    outcomes = Counter("made" if isinstance(record, Pair) else record.reason for record in found)
    assert {name[0]: count for name, count in after.of("onerec_pairs_total").items() if count} == outcomes
    assert outcomes["made"] > 1 and outcomes["behind"] > 0
    with Reader(state) as reader:
        ends = {sequence: session.end for sequence, session in reader.sessions()}
    assert all(record.ended == ends[record.sequence] for record in found)
    assert after["onerec_pair_age_seconds_count", "pair"] == len(pairs)
    assert after["onerec_pair_age_seconds_sum", "pair"] == pytest.approx(sum(now - ends[p.sequence] for p in pairs) / 1000)
    assert after["onerec_sampler_versions_behind"] == 0

    with Metrics("train", 0) as metrics, StateClock(state, "log") as clock:
        learning = TrainMetrics(metrics, clock.now_ms)
        train(state, run, settings(), progress=learning.step, saved=learning.saved)
        after = Scrape(metrics.address)
    journal = Journal(run / "journal.jsonl")
    last = latest_checkpoint(run).step
    learnt = [number for step in range(1, last + 1) if (entry := journal.entry(step)) for number in entry.pairs]
    journal.close()
    assert after["onerec_pairs_total", "learnt"] == len(learnt) == len(pairs)
    assert after["onerec_pair_age_seconds_count", "trained"] == len(pairs)
    assert after["onerec_pair_age_seconds_sum", "trained"] == pytest.approx(sum(now - ends[p.sequence] for p in pairs) / 1000)
    with_pairs = [line.preference for line in read_metrics(run / "metrics.jsonl") if line.preference is not None]
    assert after["onerec_preference_steps_total"] == len(with_pairs) > 0
    assert after["onerec_loss", "preference"] == with_pairs[-1].loss


def test_unread_pairs_and_the_age_of_the_snapshot_are_told(trained: tuple[Path, Path], tmp_path: Path) -> None:
    state, run = trained[0], Path(shutil.copytree(trained[1], tmp_path / "run"))
    stop = threading.Event()
    seen: list[Stats] = []
    with Metrics("sampler", 0) as metrics, StateClock(state, "log") as clock:
        watch = SamplerMetrics(metrics, clock.now_ms, partial(newest_version, run))

        def progress(stats: Stats) -> None:
            watch.progress(stats)
            seen.append(msgspec.structs.replace(stats))
            if stats.waiting == 0:
                stop.set()

        sample(state, run, settings(), queue=256, follow=True, wrote=watch.wrote, progress=progress, stopped=stop.is_set)
        scrape = Scrape(metrics.address)
        assert scrape["onerec_pairs_unread"] == seen[-1].unread == sum(isinstance(r, Pair) for r in records(run)) > 0
        # A newer checkpoint is there, which the sampler has not come to yet.
        newest = latest_checkpoint(run)
        later = msgspec.structs.replace(newest, step=newest.step + 1, version=newest.version + 3)
        save_checkpoint(run, later, load_weights(newest), load_optimizer(newest), load_reward_weights(newest))
        watch.progress(seen[-1])
        assert Scrape(metrics.address)["onerec_sampler_versions_behind"] == 3


def test_the_newest_version_is_that_of_the_newest_folder_and_none_where_there_is_none(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained[1], tmp_path / "run"))
    assert newest_version(run) == latest_checkpoint(run).version
    assert newest_version(tmp_path) is None
    (checkpoint_folder(run, latest_checkpoint(run).step) / STATE_FILE).write_bytes(b"{")
    assert newest_version(run) is None
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(checkpoint_folder(run, 5))


def test_a_record_from_before_sessions_ends_were_kept_is_read_and_not_aged(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained[1], tmp_path / "run"))
    sample(trained[0], run, settings(), queue=256)
    pair = next(record for record in records(run) if isinstance(record, Pair))
    content = msgspec.msgpack.decode(encode_record(pair))
    del content["ended"]
    old = decode_record(msgspec.msgpack.encode(content))
    assert old == msgspec.structs.replace(pair, ended=None)
    with Metrics("sampler", 0) as metrics:
        SamplerMetrics(metrics, lambda seen: 2 * 10**12, lambda: None).wrote([old])
        scrape = Scrape(metrics.address)
    assert scrape["onerec_pairs_total", "made"] == 1 and not scrape.of("onerec_pair_age_seconds_count")
