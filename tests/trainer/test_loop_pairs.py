"""Preference pairs in the trainer: which are learnt, which are passed over and counted, and what a replay does."""

import shutil
from pathlib import Path

import pytest
from test_loop import _small_model, fingerprint, settings, state  # noqa: F401

from onerec.errors import UserError
from trainer.checkpoint import latest_checkpoint
from trainer.evaluate import read_metrics
from trainer.journal import Journal
from trainer.loop import train
from trainer.pairs import Drop, Pair, PairLog, pairs_path
from trainer.runs import read_run


def pair(number: int, **fields: object) -> Pair:
    content = dict(
        number=number, session_id=f"s{number}", sequence=number, snapshot_step=0, snapshot_version=0, codebook_version="",
        history=[[number % 8, 0]], chosen=[[1, 1], [2, 2], [3, 3]], rejected=[[[4, 4], [5, 5], [6, 6]]],
        chosen_log_prob=-12.0, rejected_log_probs=[-12.0], chosen_reward=[0.5] * 4, rejected_rewards=[[0.1] * 4], margin=0.4,
    )
    return Pair(**(content | fields))  # type: ignore[arg-type]


@pytest.fixture
def begun(state: Path, tmp_path: Path) -> tuple[Path, str]:  # noqa: F811
    """A run of a few steps, and its codebook."""
    run = tmp_path / "run"
    seen: list[object] = []
    train(state, run, settings(), progress=seen.append, stopped=lambda: len(seen) >= 3)
    description = read_run(run)
    assert description is not None
    return run, description.codebook_version


def add(run: Path, records: list[Pair | Drop]) -> None:
    with PairLog(pairs_path(run)) as log:
        log.append(records)


def test_pairs_are_learnt_once_a_few_a_step_and_move_the_policy_towards_the_winner(
    state: Path, begun: tuple[Path, str]  # noqa: F811
) -> None:
    run, version = begun
    add(run, [pair(number, codebook_version=version) for number in range(1, 21)])
    result = train(state, run, settings("preference.pairs_per_step=8", "preference.weight=4"),
                   explicit=["preference.pairs_per_step"])
    assert result.pairs.learnt == 20 and latest_checkpoint(run).pairs == 20
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line.preference is not None]
    assert [line.preference.pairs for line in lines if line.preference] == [8, 8, 4]
    margins = [line.preference.margin for line in lines if line.preference]
    assert margins[2] > margins[1]  # type: ignore[operator]
    journal = Journal(run / "journal.jsonl")
    entries = [journal.entry(step) for step in range(1, result.steps + 1)]
    learnt = [number for entry in entries if entry for number in entry.pairs]
    assert learnt == list(range(1, 21))


def test_what_is_not_learnt_is_counted_by_its_reason(state: Path, begun: tuple[Path, str]) -> None:  # noqa: F811
    run, version = begun
    newest = latest_checkpoint(run).version
    add(run, [
        pair(1, codebook_version=version, snapshot_version=newest),
        pair(2, codebook_version="another", snapshot_version=newest),
        Drop(number=3, session_id="s3", sequence=3, snapshot_step=0, reason="tie"),
        pair(4, codebook_version=version, snapshot_version=newest - 3),
        pair(5, codebook_version=version, snapshot_version=newest),
    ])
    pairs = train(state, run, settings("preference.max_age=2")).pairs
    assert (pairs.learnt, pairs.other_codebook, pairs.dropped, pairs.stale, pairs.early) == (2, 1, 1, 1, 0)


def test_before_the_seed_model_pairs_are_passed_over(state: Path, tmp_path: Path, begun: tuple[Path, str]) -> None:  # noqa: F811
    run, version = begun
    add(run, [pair(number, codebook_version=version) for number in range(1, 4)])
    pairs = train(state, run, settings("preference.seed_sessions=1000000")).pairs
    assert pairs.learnt == 0 and pairs.early == 3


def test_a_replay_learns_the_pairs_of_the_journal_and_no_other(
    state: Path, begun: tuple[Path, str], tmp_path: Path  # noqa: F811
) -> None:
    run, version = begun
    first = [pair(number, codebook_version=version) for number in range(1, 4)]
    add(run, first)
    seen: list[object] = []
    train(state, run, settings(), progress=seen.append, stopped=lambda: len(seen) >= 2)
    add(run, [pair(number, codebook_version=version) for number in range(4, 8)])
    result = train(state, run, settings())
    assert result.pairs.learnt == 7
    again = tmp_path / "again"
    (again / "pairs").mkdir(parents=True)
    for name in ("run.json", "journal.jsonl"):
        shutil.copy(run / name, again / name)
    shutil.copy(pairs_path(run), pairs_path(again))
    train(state, again, settings())
    assert fingerprint(again)[1] == fingerprint(run)[1]
    plain = tmp_path / "plain"
    train(state, plain, settings())
    assert fingerprint(plain)[1] != fingerprint(run)[1]


def test_a_pair_log_that_lost_what_was_learnt_is_refused(
    state: Path, begun: tuple[Path, str], tmp_path: Path  # noqa: F811
) -> None:
    run, version = begun
    add(run, [pair(1, codebook_version=version)])
    train(state, run, settings())
    again = tmp_path / "again"
    again.mkdir()
    for name in ("run.json", "journal.jsonl"):
        shutil.copy(run / name, again / name)
    with pytest.raises(UserError, match="ends before record 1, which step .* restore the file, or start a new --run"):
        train(state, again, settings())


def test_conflicting_preference_settings_are_refused_before_a_run_begins(state: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="preference.label_smoothing.*ipo|ipo.*preference.label_smoothing"):
        train(state, tmp_path / "run", settings("preference.loss=ipo", "preference.label_smoothing=0.1"))
    assert not (tmp_path / "run" / "run.json").exists()
