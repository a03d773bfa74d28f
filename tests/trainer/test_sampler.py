"""The sample server: each sampled session once, in order, by the newest snapshot; bounded, killable, and never silent."""

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from test_loop import PROGRAM, SETTINGS, records, session, write

from onerec.config import Config, load_config
from onerec.errors import UserError
from trainer.checkpoint import Checkpoint, Cursor, latest_checkpoint
from trainer.config import ModelConfig
from trainer.loop import train
from trainer.pairs import Drop, Pair, PairIndex, PairLog, PairReader, Record, is_sampled, pairs_path
from trainer.sampler import Sampler, Snapshots, Waiting, sample
from trainer.sampler_stats import Meter, Stats, read_stats, stats_path
from trainer.sampling import Request

RATIO = 0.5
PREFERENCE = [f"preference.ratio={RATIO}", "preference.responses=8", "preference.min_margin=0.0"]
BOTH = PROGRAM.replace("train.register(app)", "train.register(app)\nfrom onerec.commands import sampler\nsampler.register(app)")


def small() -> Any:
    from trainer import presets

    return msgspec.structs.replace(presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1,
                                   experts=2)


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import presets

    monkeypatch.setitem(presets.PRESETS, "tiny", small())


def settings(*more: str) -> Config:
    return load_config(None, [*SETTINGS, *PREFERENCE, "catalogue.codes=8", "catalogue.levels=2", *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A state of 200 sessions, of which 160 are good, and a run that has learnt them."""
    state, run = tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("run")
    write(state, [session(i, good=i % 5 > 0) for i in range(200)], records())
    with pytest.MonkeyPatch.context() as patch:
        from trainer import presets

        patch.setitem(presets.PRESETS, "tiny", small())
        train(state, run, settings())
    yield state, run


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the trained run, without pairs."""
    return Path(shutil.copytree(trained[1], tmp_path / "run"))


def expected(first: int = 0, last: int = 200, ratio: float = RATIO) -> list[tuple[int, str]]:
    """Sequence and id of the sessions that are to be sampled."""
    numbered = [(i + 1, session(i).session_id) for i in range(first, last) if i % 5 > 0]
    return [(sequence, name) for sequence, name in numbered if is_sampled(name, ratio)]


def read(run: Path) -> list[Record]:
    with PairReader(pairs_path(run)) as reader:
        return reader.read(0, 10_000)


def places(found: list[Record]) -> list[tuple[int, str]]:
    return [(record.sequence, record.session_id) for record in found]


def test_each_sampled_session_has_one_record_in_the_order_of_the_log(trained: tuple[Path, Path], run: Path) -> None:
    stats = sample(trained[0], run, settings(), queue=256)
    found = read(run)
    assert places(found) == expected() and [record.number for record in found] == list(range(1, len(found) + 1))
    pairs = [record for record in found if isinstance(record, Pair)]
    checkpoint = latest_checkpoint(run)
    assert len(pairs) > 0.5 * len(found)
    for pair in pairs:
        assert (pair.snapshot_step, pair.snapshot_version) == (checkpoint.step, checkpoint.version)
        assert len(pair.chosen) == 3 and len(pair.rejected) == 1 and pair.margin > 0
    assert (stats.records, stats.pairs, stats.made) == (len(found), len(pairs), len(found))
    assert stats.generated == 8 * len(found) and stats.waiting == 0 and stats.unread == len(pairs)
    again = sample(trained[0], run, settings(), queue=256)
    assert again.made == 0 and read(run) == found and (again.records, again.drops) == (stats.records, stats.drops)
    written = read_stats(stats_path(run))
    assert written is not None and written.pairs == len(pairs) and written.cpu_seconds >= stats.cpu_seconds


def test_it_goes_on_with_what_a_newer_snapshot_has_learnt(trained: tuple[Path, Path], tmp_path: Path, run: Path) -> None:
    state = Path(shutil.copytree(trained[0], tmp_path / "state"))
    moved = run / "run.json"
    moved.write_bytes(moved.read_bytes().replace(str(trained[0]).encode(), str(state).encode()))
    sample(state, run, settings(), queue=256)
    before = latest_checkpoint(run)
    write(state, [session(i) for i in range(200, 240)], [])
    sample(state, run, settings(), queue=256)
    assert places(read(run)) == expected(), "sessions that the trainer has not learnt are not sampled"
    train(state, run, settings())
    after = latest_checkpoint(run)
    assert after.pairs > before.pairs
    sample(state, run, settings(), queue=256)
    new = read(run)[len(expected()) :]
    assert places(new) == [
        (i + 1, session(i).session_id) for i in range(200, 240) if is_sampled(session(i).session_id, RATIO)
    ]
    assert {record.snapshot_step for record in new} == {after.step}


def test_more_than_the_queue_is_passed_over_oldest_first_and_counted(trained: tuple[Path, Path], run: Path) -> None:
    stats = sample(trained[0], run, settings(), queue=5)
    found = read(run)
    assert places(found) == expected()
    behind = [isinstance(record, Drop) and record.reason == "behind" for record in found]
    assert behind == [True] * (len(found) - 5) + [False] * 5
    assert stats.drops["behind"] == len(found) - 5 and stats.generated == 40


class Things:
    """A source in memory that counts what it is asked for."""

    def __init__(self, waiting: int, unread: int = 0) -> None:
        self.waiting = [Waiting(f"u{i}:1", i + 1, [], 10**12 + i) for i in range(waiting)]
        self.written: list[Record] = []
        self.read = -unread

    def take(self, checkpoint: Checkpoint) -> None:
        pass

    def due(self) -> int:
        return len(self.waiting)

    def next(self, count: int) -> list[Waiting]:
        return self.waiting[:count]

    def put(self, found: list[Record]) -> bool:
        assert [record.sequence for record in found] == [w.sequence for w in self.waiting[: len(found)]]
        self.written += found
        del self.waiting[: len(found)]
        return True

    def unread(self, checkpoint: Checkpoint) -> int:
        return len(self.written) - self.read


class Still(Snapshots):
    """One snapshot for ever, that drops everything as a tie."""

    def __init__(self) -> None:
        self.checkpoint = checkpoint(1, 0)
        self.maker: Any = self

    def look(self) -> bool:
        return False

    def requests(self, waiting: Any) -> list[Request]:
        return [Request(w.session_id, w.sequence, np.empty(0, np.int32)) for w in waiting]

    def make_counted(self, requests: list[Request]) -> tuple[list[Record], int]:
        return [
            Drop(number=0, session_id=r.session_id, sequence=r.sequence, snapshot_step=1, reason="tie") for r in requests
        ], 4 * len(requests)


def checkpoint(version: int, pairs: int, **counters: int) -> Checkpoint:
    return Checkpoint(
        step=version * 10, cursor=Cursor(), watermark=None, codebook_version="c", items=1, model_config=ModelConfig(),
        session_items=3, metrics_bytes=0, score=None, counters=counters, created_ms=0, version=version, pairs=pairs,
    )


def test_it_waits_while_as_many_pairs_are_unread_as_the_queue_holds(tmp_path: Path) -> None:
    source = Things(waiting=30)
    lines: list[str] = []
    most = [0]

    def sleep(seconds: float) -> None:
        most[0] = max(most[0], len(source.written) - source.read)
        if len(lines) == 1 and source.read == 0:
            source.read = 8
        elif source.due():
            source.read = len(source.written)
        else:
            stop.append(1)

    stop: list[int] = []
    sampler = Sampler(source, Still(), Meter(tmp_path / "stats.json", PairIndex()), queue=12, sleep=sleep)
    # 30 wait where 12 may: 18 are passed over, and fill the queue.
    stats = sampler.run(True, lambda: bool(stop), lines.append, lambda stats: None)
    assert [getattr(record, "reason", "") for record in source.written] == ["behind"] * 18 + ["tie"] * 12
    assert lines[0] == "18 pairs are unread (--queue 12): waiting for the trainer"
    assert stats.generated == 4 * 12 and stats.made == 30
    source = Things(waiting=10, unread=20)
    sampler = Sampler(source, Still(), Meter(tmp_path / "stats.json", PairIndex()), queue=12)
    ended = sampler.run(False, lambda: False, lines.append, lambda stats: None)
    assert not source.written and ended.unread == 20 and ended.waiting == 10


def test_it_waits_for_a_snapshot_that_can_judge(trained: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    state = trained[0]
    with pytest.raises(UserError, match="no checkpoint with a reward model yet"):
        (tmp_path / "empty").mkdir()
        sample(state, tmp_path / "empty", settings(), queue=256)
    with pytest.raises(UserError, match=r"run .*nowhere: there is none; onerec train"):
        sample(state, tmp_path / "nowhere", settings(), queue=256)
    with pytest.raises(UserError, match=r"preference\.ratio is 0"):
        sample(state, run, settings("preference.ratio=0"), queue=256)
    lines: list[str] = []
    with pytest.raises(UserError, match="no checkpoint with a reward model yet"):
        sample(state, run, settings("preference.seed_sessions=161"), queue=256, say=lines.append)
    assert lines == ["waiting for a seed model: 161 sessions learnt"]
    assert sample(state, run, settings("preference.seed_sessions=160"), queue=256).pairs > 0
    without = tmp_path / "without"
    train(state, without, settings("reward.train=false", "preference.ratio=0"))
    lines.clear()
    with pytest.raises(UserError, match="no checkpoint with a reward model yet"):
        sample(state, without, settings(), queue=256, say=lines.append)
    assert len(lines) == 1 and "holds no reward model" in lines[0]


def test_following_it_waits_for_the_first_snapshot_and_ends_on_a_signal(trained: tuple[Path, Path], tmp_path: Path) -> None:
    state, run = trained[0], tmp_path / "run"
    lines: list[str] = []
    stop: list[int] = []
    ended: list[Stats] = []
    thread = threading.Thread(target=lambda: ended.append(
        sample(state, run, settings(), queue=256, follow=True, stopped=lambda: bool(stop), say=lines.append)
    ))
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lines == ["waiting for the first checkpoint with a reward model"]
        for folder in trained[1].iterdir():
            (shutil.copytree if folder.is_dir() else shutil.copy)(folder, run / folder.name)
        while len(read(run)) < len(expected()) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        stop.append(1)
        thread.join(60)
    assert places(read(run)) == expected() and ended[0].made == len(expected())


def test_another_codebook_another_state_and_a_second_sampler_are_refused(
    trained: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write(other, [session(i) for i in range(30)], records())
    train(other, tmp_path / "its run", settings("catalogue.seed=5"))
    with pytest.raises(UserError, match="has learnt the semantic IDs of codebook .* sample with the state"):
        sample(other, run, settings(), queue=256)
    with PairLog(pairs_path(run)), pytest.raises(UserError, match="another sampler writes"):
        sample(trained[0], run, settings(), queue=256)


def test_a_damaged_checkpoint_is_passed_over_and_said(trained: tuple[Path, Path], run: Path) -> None:
    newest = latest_checkpoint(run)
    (newest.path / "reward.safetensors").write_bytes(b"broken")
    lines: list[str] = []
    sample(trained[0], run, settings(), queue=256, say=lines.append)
    assert len(lines) == 1 and "passed over" in lines[0] and "reward.safetensors" in lines[0]
    before = latest_checkpoint(run)
    assert before.step < newest.step and {record.snapshot_step for record in read(run)} == {before.step}
    assert places(read(run)) == [place for place in expected() if place[0] <= before.cursor.sequence]


def test_figures_tell_staleness_and_the_share_of_the_compute(tmp_path: Path) -> None:
    now, cpu = [0.0], [2.0]

    def pair(sequence: int, version: int) -> Pair:
        return Pair(number=0, session_id=str(sequence), sequence=sequence, snapshot_step=1, snapshot_version=version,
                    codebook_version="c", history=[], chosen=[], rejected=[], chosen_log_prob=0.0, rejected_log_probs=[],
                    chosen_reward=[], rejected_rewards=[], margin=1.0)

    with PairLog(pairs_path(tmp_path)) as log:
        meter = Meter(stats_path(tmp_path), log, clock=lambda: now[0], cpu=lambda: cpu[0])
        meter.moved(checkpoint(1, 0))
        with meter.busy():
            now[0], cpu[0] = 4.0, 5.0
        meter.made(log.append([pair(1, 1), pair(2, 1), pair(3, 1)]), 384)
        meter.moved(checkpoint(2, 2, cpu_ms=40_000))
        meter.moved(checkpoint(5, 3, cpu_ms=50_000))
        stats = meter.stats()
        assert (stats.taken, stats.versions_behind_mean, stats.versions_behind_max) == (3, 1.0, 3)
        assert (stats.pairs_per_second, stats.sessions_per_second, stats.busy_seconds) == (0.75, 96.0, 4.0)
        assert (stats.trainer_cpu_seconds, stats.compute_share) == (50.0, 0.06)
        meter.write()
    with PairLog(pairs_path(tmp_path)) as log:
        restarted = Meter(stats_path(tmp_path), log, clock=lambda: now[0], cpu=lambda: cpu[0])
        cpu[0] += 2.0
        again = restarted.stats()
        assert (again.pairs, again.made, again.cpu_seconds) == (3, 0, 5.0)


def start(command: str, state: Path, run: Path, *more: str) -> subprocess.Popen[bytes]:
    options = [part for setting in (*SETTINGS, *PREFERENCE) for part in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-c", BOTH, command, "--state", str(state), "--run", str(run), "--json", *options, *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_killed_at_random_moments_no_session_is_lost_or_sampled_twice(trained: tuple[Path, Path], run: Path) -> None:
    rng = random.Random(3)
    log = pairs_path(run)
    kills = 0
    while True:
        process = start("sampler", trained[0], run)
        try:
            before = log.stat().st_size if log.exists() else -1
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if log.exists() and log.stat().st_size != before:
                    break
                time.sleep(0.001)
            if kills < 3:
                time.sleep(rng.random() * 0.03)
                process.send_signal(signal.SIGKILL)
            output, error = process.communicate(timeout=120)
        finally:
            process.kill()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error.decode()
        kills += 1
    assert kills >= 2
    assert orjson.loads(output)["records"] == len(expected())
    assert places(read(run)) == expected()


@pytest.mark.slow
def test_trainer_and_sampler_killed_side_by_side_use_no_pair_twice_and_a_replay_gives_the_same_weights(
    tmp_path: Path,
) -> None:
    state, run = tmp_path / "state", tmp_path / "run"
    write(state, [session(i) for i in range(60)], records())
    rng = random.Random(11)
    more: dict[str, list[str]] = {"sampler": [], "train": []}
    for setting in ("train.idle_seconds=0.2", "train.checkpoint_seconds=0.5", "preference.max_age=1000"):
        more["train"] += ["--set", setting]
    processes = {name: start(name, state, run, "--follow", *more[name]) for name in more}
    wanted, written = 0, 60
    try:
        deadline = time.monotonic() + 180
        for victim in ("sampler", "train", None):
            wanted = _learnt_pairs(run) + 4
            while _learnt_pairs(run) < wanted and time.monotonic() < deadline:
                for name, process in processes.items():
                    assert process.poll() is None, (name, process.communicate()[1].decode())
                # A log that goes on: only steps learn pairs.
                write(state, [session(written)], [])
                written += 1
                time.sleep(0.1)
            assert _learnt_pairs(run) >= wanted
            if victim is not None:
                time.sleep(rng.random() * 0.2)
                processes[victim].kill()
                processes[victim].wait()
                processes[victim] = start(victim, state, run, "--follow", *more[victim])
        for name in ("sampler", "train"):
            processes[name].send_signal(signal.SIGTERM)
            output, error = processes[name].communicate(timeout=60)
            assert processes[name].returncode == 0, error.decode()
    finally:
        for process in processes.values():
            process.kill()
    found = read(run)
    assert places(found) == [
        (i + 1, session(i).session_id) for i in range(found[-1].sequence) if is_sampled(session(i).session_id, RATIO)
    ]
    end = latest_checkpoint(run)
    learnt = _learnt(run, end.step)
    assert len(learnt) == len(set(learnt)) >= wanted
    again = tmp_path / "again"
    (again / "pairs").mkdir(parents=True)
    for name in ("journal.jsonl", "run.json", "pairs/pairs.log"):
        shutil.copy(run / name, again / name)
    replayed = start("train", state, again)
    output, error = replayed.communicate(timeout=120)
    assert replayed.returncode == 0, error.decode()
    files = latest_checkpoint(again).files
    assert orjson.loads(output.splitlines()[-1])["steps"] == end.step
    assert files == end.files


def _learnt(run: Path, steps: int) -> list[int]:
    """Numbers of the pairs that the journal says were learnt up to a step."""
    lines = (run / "journal.jsonl").read_bytes().splitlines() if (run / "journal.jsonl").exists() else []
    entries = [orjson.loads(line) for line in lines if line.endswith(b"}")]
    return [number for entry in entries if entry["step"] <= steps for number in entry.get("pairs", [])]


def _learnt_pairs(run: Path) -> int:
    return len(_learnt(run, 1 << 30))
