"""The trainer as a whole: learns, scores before it learns, resumes to the same bytes, refuses what does not fit."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import orjson
import pytest

from onerec.config import Config, load_config
from onerec.errors import UserError
from onerec.versions import code_version
from streaming.changes import Changes, Counters
from streaming.items import ItemRecord
from streaming.semantics import Semantics, SessionConfig
from streaming.sessions import Session, SessionItem
from streaming.store import Store
from trainer.checkpoint import checkpoint_folder, checkpoint_steps, latest_checkpoint, load_model
from trainer.evaluate import means, read_metrics
from trainer.loop import Result, train
from trainer.runs import read_run

ITEMS = 48
SEMANTICS = Semantics(session=SessionConfig(target_items=3))
SETTINGS = ["train.batch_windows=8", "train.checkpoint_sessions=20", "train.threads=1", "train.score_share=0.5",
            "train.score_beams=4", "train.learning_rate=0.003", "train.precision=fp32", "train.keep_checkpoints=2"]


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import presets

    small = msgspec.structs.replace(presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1,
                                    decoder_layers=1, experts=2)
    monkeypatch.setitem(presets.PRESETS, "tiny", small)


def records(first: int = 0, last: int = ITEMS) -> list[ItemRecord]:
    """Items of eight tastes, told apart by tag and embedding."""
    rng = random.Random(first)
    return [
        ItemRecord(item_id=f"i{i}", ts=10**12, duration_ms=10_000, tags=[str(i % 8)],
                   embedding=[float(i % 8 == k) + 0.2 * rng.random() for k in range(8)])
        for i in range(first, last)
    ]


def session(number: int, items: int = ITEMS, good: bool = True) -> Session:
    """A user of one taste goes on through its items, i to i + 8: easy to learn."""
    rng = random.Random(number)
    start = 10**12 + number * 60_000
    first = rng.randrange(items)
    ids = [f"i{(first + 8 * k) % items}" for k in range(-3, rng.choice([2, 3, 3, 4, 6]))]
    watched = [SessionItem(item, start + k, 9000, 9000, [], True) for k, item in enumerate(ids[3:])]
    positives = [(item.ts, item.item_id) for item in watched[:-1]]
    return Session(f"u{number}:{start}", f"u{number}", None, start, watched[-1].ts, watched, ids[:3], len(watched),
                   9000 * len(watched), 0, good, 0.1, 1.0, 0, 0, positives)


def write(state: Path, sessions: list[Session], items: list[ItemRecord], semantics: Semantics = SEMANTICS) -> None:
    """Commit sessions and items to a state, as the stream would."""
    with Store(state, semantics) as store:
        core = store.core()
        counters = core.counters
        core.counters = Counters(
            events=counters.events + len(sessions), sessions=counters.sessions + len(sessions),
            high_quality=counters.high_quality + sum(s.high_quality for s in sessions),
        )
        if items:
            store.put_items(items)
        store.commit(core, Changes({}, sessions, [], []), {"log.jsonl": {"records": counters.events + len(sessions)}})


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state")
    write(path, [session(i, good=i % 5 > 0) for i in range(200)], records())
    return path


def settings(*more: str) -> Config:
    return load_config(None, [*SETTINGS, "catalogue.codes=8", "catalogue.levels=2", *more])


def fingerprint(run: Path) -> tuple[int, str, str]:
    """Step, weights of both models with their optimisers, and what was measured, at a run's end."""
    checkpoint = latest_checkpoint(run)
    digest = hashlib.sha256((run / "metrics.jsonl").read_bytes() + (run / "rewards.bin").read_bytes()).hexdigest()
    assert checkpoint.files.keys() == {"model.safetensors", "optimizer.safetensors", "reward.safetensors"}
    return checkpoint.step, "".join(checkpoint.files[name] for name in sorted(checkpoint.files)), digest


@pytest.fixture(scope="module")
def reference(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Result]]:
    run = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        from trainer import presets

        patch.setitem(presets.PRESETS, "tiny", msgspec.structs.replace(
            presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, experts=2))
        yield run, train(state, run, settings())


def test_each_high_quality_session_is_learnt_once(state: Path, reference: tuple[Path, Result]) -> None:
    run, result = reference
    assert result.sessions == result.new_sessions == 160
    lines = read_metrics(run / "metrics.jsonl")
    assert sum(line.sessions for line in lines) == 160
    assert sum(line.windows for line in lines) == result.windows
    assert [line.step for line in lines] == list(range(1, result.steps + 1))
    assert result.unknown_targets == result.unknown_history == result.skipped_steps == 0
    again = train(state, run, settings())
    assert again.new_sessions == 0 and again.steps == result.steps


def test_it_learns_what_it_had_not_seen(reference: tuple[Path, Result]) -> None:
    lines = read_metrics(reference[0] / "metrics.jsonl")
    assert lines[-1].loss is not None and lines[0].loss is not None
    assert lines[-1].loss < 0.8 * lines[0].loss
    windows, scores = means(lines)
    assert 0.3 < windows / sum(line.windows for line in lines) < 0.7
    assert scores.keys() == {"onerec", "popularity", "covisitation"}
    assert all(values.keys() >= {"hit@1", "hit@10", "ndcg@10", "session_recall"} for values in scores.values())


def test_checkpoints_are_kept_by_age_and_score(reference: tuple[Path, Result]) -> None:
    run, result = reference
    steps = checkpoint_steps(run)
    assert steps[-1] == result.steps and 2 <= len(steps) <= 3
    checkpoint = latest_checkpoint(run)
    assert checkpoint.counters["sessions"] == 160
    assert load_model(checkpoint).config == read_run(run).model  # type: ignore[union-attr]


def test_a_checkpoint_says_what_it_was_made_of(state: Path, reference: tuple[Path, Result]) -> None:
    run, _ = reference
    checkpoint = latest_checkpoint(run)
    assert checkpoint.source == {"log.jsonl": {"records": 200}}
    assert checkpoint.config_sha256 == hashlib.sha256((run / "run.json").read_bytes()).hexdigest()
    assert checkpoint.code_version == code_version()


def test_stopped_anywhere_and_started_again_gives_the_same_bytes(
    state: Path, reference: tuple[Path, Result], tmp_path: Path
) -> None:
    rng = random.Random(1)
    run = tmp_path / "run"
    for _ in range(40):
        left = rng.randrange(1, 6)
        seen = []
        result = train(state, run, settings(), progress=seen.append, stopped=lambda: len(seen) >= left)  # noqa: B023
        if not result.stopped:
            break
    assert fingerprint(run) == fingerprint(reference[0])


def test_a_damaged_checkpoint_is_passed_over_in_words(
    state: Path, reference: tuple[Path, Result], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference[0], run)
    newest = checkpoint_folder(run, checkpoint_steps(run)[-1])
    (newest / "model.safetensors").write_bytes(b"gone")
    said: list[str] = []
    result = train(state, run, settings(), say=said.append)
    assert any("model.safetensors" in text for text in said)
    assert result.new_sessions > 0
    assert fingerprint(run) == fingerprint(reference[0])


def test_a_backlog_learnt_twice_is_scored_once(state: Path, tmp_path: Path, reference: tuple[Path, Result]) -> None:
    end = session(100).end + 1
    run = tmp_path / "run"
    more = ["train.backlog_passes=2", f"train.backlog_until_ms={end}"]
    seen: list[object] = []
    train(state, run, settings(*more), progress=seen.append, stopped=lambda: len(seen) >= 14)
    result = train(state, run, settings(*more))
    assert result.sessions == 160
    lines = read_metrics(run / "metrics.jsonl")
    assert sum(line.scored for line in lines) == sum(
        line.scored for line in read_metrics(reference[0] / "metrics.jsonl")
    )
    assert sum(line.sessions for line in lines) == 160 + sum(session(i).high_quality and i % 5 > 0 for i in range(101))
    whole = tmp_path / "whole"
    train(state, whole, settings(*more))
    assert fingerprint(whole) == fingerprint(run)


def test_without_a_good_session_it_says_which_threshold(tmp_path: Path) -> None:
    write(tmp_path / "state", [session(i, good=False) for i in range(10)], records())
    with pytest.raises(UserError, match=r"none of its 10 sessions.*10 below session\.min_interactions=1"):
        train(tmp_path / "state", tmp_path / "run", settings())
    assert not (tmp_path / "run" / "run.json").exists()


def test_another_codebook_is_refused(reference: tuple[Path, Result], state: Path, tmp_path: Path) -> None:
    other = tmp_path / "state"
    write(other, [session(i) for i in range(30)], records(0, 30))
    run = tmp_path / "run"
    shutil.copytree(reference[0], run)
    description = read_run(run)
    assert description is not None
    (run / "run.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(description, state=str(other))))
    from streaming.store import Reader
    from trainer.items import build_catalogue

    with Reader(other) as reader:
        build_catalogue(other, reader, settings())
    with pytest.raises(UserError, match="codebook.*--run"):
        train(other, run, settings())


def test_other_settings_and_another_state_are_refused(
    reference: tuple[Path, Result], state: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference[0], run)
    with pytest.raises(UserError, match="train.learning_rate=0.003, not 0.1"):
        train(state, run, settings("train.learning_rate=0.1"), explicit=["train.learning_rate"])
    assert train(state, run, settings("train.idle_seconds=9"), explicit=["train.idle_seconds"]).new_sessions == 0
    other = tmp_path / "other"
    write(other, [session(1)], records())
    with pytest.raises(UserError, match="was begun on the state"):
        train(other, run, settings())


def test_two_trainers_in_one_run_are_refused(state: Path, tmp_path: Path) -> None:
    def second(_: object) -> None:
        with pytest.raises(UserError, match="another trainer"):
            train(state, tmp_path / "run", settings())
        refused.append(True)

    refused: list[bool] = []
    train(state, tmp_path / "run", settings(), progress=second, stopped=lambda: bool(refused))
    assert refused == [True]


PROGRAM = """
import sys
import msgspec
from pathlib import Path
from trainer import presets
presets.PRESETS["tiny"] = msgspec.structs.replace(presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32,
                                                  encoder_layers=1, decoder_layers=1, experts=2)
from onerec.cli import app
from onerec.commands import train
import typer
app = typer.Typer()
train.register(app)
app.command()(lambda: None)
app()
"""


def start(state: Path, run: Path, *more: str) -> subprocess.Popen[bytes]:
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "train", "--state", str(state), "--run", str(run), "--json", *options, *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_killed_at_random_moments_gives_the_same_bytes(
    state: Path, reference: tuple[Path, Result], tmp_path: Path
) -> None:
    rng = random.Random(7)
    run = tmp_path / "run"
    kills = 0
    while True:
        process = start(state, run)
        try:
            # Until the run is under way, then a random moment of its about 1.5 s of work.
            deadline = time.monotonic() + 60
            before = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else -1
            while process.poll() is None and time.monotonic() < deadline:
                if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size != before:
                    break
                time.sleep(0.005)
            if kills < 6:
                time.sleep(rng.random() * 0.15)
                process.send_signal(signal.SIGKILL)
            output, error = process.communicate(timeout=120)
        finally:
            process.kill()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error.decode()
        kills += 1
    assert kills >= 3
    assert orjson.loads(output.splitlines()[-1])["sessions"] == 160
    assert fingerprint(run) == fingerprint(reference[0])


@pytest.mark.slow
def test_follow_learns_what_arrives_and_its_journal_repeats_it(tmp_path: Path) -> None:
    state, run = tmp_path / "state", tmp_path / "run"
    write(state, [session(i) for i in range(20)], records())
    process = start(state, run, "--follow", "--set", "train.idle_seconds=0.2")
    try:
        for number in (20, 33, 41):
            while process.poll() is None and _learnt(run) < number:
                time.sleep(0.02)
            if number == 33:
                process.send_signal(signal.SIGKILL)
                process.wait()
                process = start(state, run, "--follow", "--set", "train.idle_seconds=0.2")
            items = 64 if number >= 33 else ITEMS
            write(state, [session(i, items) for i in range(number, {20: 33, 33: 41, 41: 50}[number])],
                  records(ITEMS, 64) if number == 33 else [])
        while process.poll() is None and _learnt(run) < 50:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, error.decode()
    result = orjson.loads(output.splitlines()[-1])
    assert result["sessions"] == 50 and result["stopped"] and result["watermark"] is None
    entries = [orjson.loads(line) for line in (run / "journal.jsonl").read_bytes().splitlines()]
    assert any("end" in entry for entry in entries) and {e.get("items") for e in entries} >= {ITEMS, 64}
    again = tmp_path / "again"
    again.mkdir()
    for name in ("journal.jsonl", "run.json"):
        shutil.copy(run / name, again / name)
    replayed = start(state, again)
    output, error = replayed.communicate(timeout=120)
    assert replayed.returncode == 0, error.decode()
    assert fingerprint(again) == fingerprint(run)


def _learnt(run: Path) -> int:
    return sum(line.sessions for line in read_metrics(run / "metrics.jsonl"))


def test_what_an_idle_log_left_learnt_is_saved_after_the_seconds_asked_for(
    state: Path, tmp_path: Path, reference: tuple[Path, Result]
) -> None:
    deadline = time.monotonic() + 60
    seen: list[int] = []

    def stopped() -> bool:
        seen.extend(step for step in checkpoint_steps(tmp_path) if step == reference[1].steps)
        return bool(seen) or time.monotonic() > deadline

    quick = settings("train.checkpoint_sessions=1000000", "train.checkpoint_seconds=0.5", "train.idle_seconds=0.2")
    train(state, tmp_path, quick, follow=True, stopped=stopped)
    assert seen
    assert fingerprint(tmp_path) == fingerprint(reference[0])
