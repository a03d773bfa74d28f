"""The comparison as a whole: about a hundred sessions, every method, one line each, whatever fails or is killed."""

import functools
import os
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
from typer.testing import CliRunner

from onerec.errors import Failure, UserError
from streaming.store import Reader
from trainer import methods, presets, table
from trainer.judge import is_legal
from trainer.methods import METHODS, PARTS, item_sequences, load_reward_model
from trainer.reward_training import RewardTraining, fit_reward_model, judged_sessions
from trainer.reward_weights import TARGETS
from trainer.table import TRIAL, Line, Report, read_lines, run_table
from trainer.table_data import (
    Data,
    item_facts,
    open_catalogue,
    prepare_world,
    test_cases,
    test_state,
    train_state,
    training_examples,
)
from trainer.table_view import against_reference, markdown, plot, summaries

test_cases.__test__ = test_state.__test__ = False  # type: ignore[attr-defined]  # no tests, for all their names
SMALL = msgspec.structs.replace(
    presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, experts=2
)
TIMES = ("seconds", "own_seconds", "judge_seconds", "notes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the comparison of this module lies."""
    return tmp_path_factory.mktemp("table")


@pytest.fixture(scope="module", autouse=True)
def _small_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", SMALL)
        yield


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    """Every method of seed 0."""
    return run_table(folder, TRIAL, methods=list(METHODS), seeds=[0])


def figures(lines: list[Line]) -> list[dict[str, object]]:
    """The lines without what depends on the clock, by method."""
    kept = [{name: value for name, value in line.values.items() if name not in TIMES} for line in lines]
    return sorted(kept, key=lambda line: str(line["method"]))


@pytest.mark.slow
def test_every_method_ends_with_a_line_of_figures(report: Report) -> None:
    assert report.failures == []
    assert [line.method for line in report.lines] == list(METHODS)
    for line in report.lines:
        values = orjson.loads(orjson.dumps(line.values))
        assert list(values)[:8] == ["method", "seed", "reward", "true_reward", "hr@10", "ndcg@10", "legal", "seconds"]
        for kind in ("reward", "true_reward"):
            assert list(values[kind]) == list(TARGETS)
            for told in values[kind].values():
                assert 0 < told["mean"] <= told["max"] < 1
                assert told["first"] <= told["max"]
        for name in ("hr@10", "ndcg@10", "legal", "coverage", "diversity", "new_items"):
            assert 0 <= values[name] <= 1
        assert values["hr@5"] <= values["hr@10"]
        assert values["judge_seconds"] > 0


@pytest.mark.slow
def test_what_goes_on_from_something_counts_its_seconds_too(report: Report, folder: Path) -> None:
    for line in report.lines:
        needed = METHODS[line.method].needs
        parts = sum(orjson.loads((folder / "seed-0" / f"{name}.json").read_bytes())["seconds"] for name in needed)
        assert line.values["seconds"] == pytest.approx(line.values["own_seconds"] + parts, abs=0.01)
        assert set(needed) <= set(line.values["notes"])


@pytest.mark.slow
def test_preference_methods_differ_from_the_model_that_they_go_on_from(report: Report) -> None:
    found = {str(line["method"]): line["reward"] for line in figures(report.lines)}
    assert found["onerec+dpo"] != found["onerec"] != found["onerec+ntp"]
    assert found["onerec+ipa"] != found["onerec+ntp"] and found["onerec+ecpo"] != found["onerec"]


@pytest.mark.slow
def test_a_second_call_does_nothing_again(report: Report, folder: Path) -> None:
    heard: list[tuple[Line, bool]] = []
    again = run_table(
        folder, TRIAL, methods=list(METHODS), seeds=[0], say=pytest.fail,
        progress=lambda line, fresh: heard.append((line, fresh)),
    )
    assert again == report
    assert heard == [(line, False) for line in report.lines]


@pytest.mark.slow
def test_other_settings_and_unknown_methods_are_refused(report: Report, folder: Path) -> None:
    other = msgspec.structs.replace(TRIAL, settings=msgspec.structs.replace(TRIAL.settings, width=9))
    with pytest.raises(UserError, match="other settings"):
        run_table(folder, other, methods=["onerec"], seeds=[0])
    with pytest.raises(UserError, match="unknown method 'sasrek'.*popularity"):
        run_table(folder, TRIAL, methods=["sasrek"], seeds=[0])


@pytest.mark.slow
def test_a_method_that_fails_costs_no_other_its_line(
    report: Report, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "seed-0", tmp_path / "seed-0")
    (tmp_path / "seed-0" / "onerec-model.json").unlink()

    def broken(task: methods.Task) -> dict[str, object]:
        raise ValueError("out of tune")

    monkeypatch.setitem(PARTS, "onerec-model", broken)
    found = run_table(tmp_path, TRIAL, methods=["onerec+ipa", "onerec", "popularity"], seeds=[0])
    assert [line.method for line in found.lines] == ["popularity"]
    assert dict((method, reason) for method, _, reason in found.failures) == {
        "onerec-model": "ValueError: out of tune", "onerec": "needs onerec-model, which failed",
        "onerec+ipa": "needs onerec-model, which failed",
    }
    monkeypatch.undo()
    presets.PRESETS["tiny"] = SMALL
    mended = run_table(tmp_path, TRIAL, methods=["onerec", "popularity"], seeds=[0])
    assert figures(mended.lines) == [line for line in figures(report.lines) if line["method"] in ("onerec", "popularity")]


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same_lines(report: Report, tmp_path: Path) -> None:
    chosen = ["popularity", "onerec", "onerec+ipa"]
    script = (
        "import sys; from pathlib import Path; from trainer import presets, table; import msgspec\n"
        f"presets.PRESETS['tiny'] = msgspec.json.decode({msgspec.json.encode(SMALL)!r}, type=type(presets.PRESETS['tiny']))\n"
        f"table.run_table(Path(sys.argv[1]), table.TRIAL, methods={chosen}, seeds=[0])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kept in (0, 1):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while len(read_lines(tmp_path)) <= kept and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with open(tmp_path / table.LINES_FILE, "ab") as file:
        file.write(b'{"method":"onerec+ipa","se')  # what a kill within a write leaves
    subprocess.run(command, env=environment, check=True, timeout=240)
    assert figures(read_lines(tmp_path)) == [line for line in figures(report.lines) if line["method"] in chosen]


@pytest.mark.slow
def test_nothing_of_the_last_day_is_learnt(report: Report, folder: Path) -> None:
    place = folder / "seed-0"
    data = msgspec.json.decode((place / "data.json").read_bytes(), type=Data)
    catalogue = open_catalogue(place)
    with Reader(train_state(place)) as reader:
        assert all(session.end < data.cut_ms for _, session in reader.sessions())
        facts = item_facts(reader, catalogue)
        examples = list(training_examples(reader, catalogue, m=5))
        histories = dict(reader.users())
    assert facts.label == "topic" and (facts.upload_ms < data.cut_ms).all() and (facts.upload_ms > 0).all()
    assert max(example.ts for example in examples) < data.cut_ms
    cases = test_cases(place, data, catalogue, count=1000, seed=0)
    assert {case.ts >= data.cut_ms for case in cases} == {True}
    assert len({case.user_id for case in cases}) == len(cases) > 5
    known = [case for case in cases if case.user_id in histories]
    assert known and any(len(case.history) for case in known)
    fewer = test_cases(place, data, catalogue, count=5, seed=1)
    assert len(fewer) == 5 and {case.user_id for case in fewer} <= {case.user_id for case in cases}


@pytest.mark.slow
def test_data_half_made_is_made_anew(report: Report, folder: Path, tmp_path: Path) -> None:
    assert TRIAL.world is not None
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "events.jsonl").write_bytes(b'{"type":"wat')
    prepare_world(torn, TRIAL.world, TRIAL.config)
    assert (torn / "events.jsonl").read_bytes() == (folder / "seed-0" / "events.jsonl").read_bytes()
    with pytest.raises(UserError, match="other data settings"):
        prepare_world(torn, msgspec.structs.replace(TRIAL.world, seed=1), TRIAL.config)
    with pytest.raises(UserError, match="2 or more"):
        prepare_world(tmp_path / "short", msgspec.structs.replace(TRIAL.world, days=1), TRIAL.config)


@pytest.mark.slow
def test_sequences_hold_each_user_s_items_in_time_order(report: Report, folder: Path) -> None:
    place = folder / "seed-0"
    catalogue = open_catalogue(place)
    with Reader(train_state(place)) as reader:
        examples = list(training_examples(reader, catalogue, m=5))
        watched: dict[str, list[int]] = {}
        for _, session in reader.sessions():
            if session.high_quality:
                watched.setdefault(session.user_id, []).extend(catalogue.index[item.item_id] for item in session.items)
    found = {tuple(sequence[-len(items) :]) for items in watched.values() for sequence in item_sequences(examples)}
    assert all(tuple(items) in found for items in watched.values())


@pytest.mark.slow
def test_the_judge_of_a_seed_is_the_same_twice_and_better_than_a_constant(report: Report, folder: Path) -> None:
    place = folder / "seed-0"
    catalogue = open_catalogue(place)
    kept = load_reward_model(place)
    with Reader(train_state(place)) as reader:
        sessions = judged_sessions(reader, catalogue, kept.config)
        assert len(sessions) == reader.counters().sessions
    fit = functools.partial(
        fit_reward_model, sessions, catalogue.item_codes, kept.config, centroids=catalogue.centroids
    )
    again, record = fit(TRIAL.settings.reward_training)
    assert all((value == again.state_dict()[name]).all() for name, value in kept.state_dict().items())
    _, longer = fit(RewardTraining(epochs=4))
    assert longer.loss < longer.constant_loss == record.constant_loss
    with pytest.raises(UserError, match="too few"):
        fit_reward_model(sessions[:5], catalogue.item_codes, kept.config, RewardTraining())


@pytest.mark.slow
def test_what_is_shown_is_legal_for_every_generator(report: Report, folder: Path) -> None:
    place = folder / "seed-0"
    data = msgspec.json.decode((place / "data.json").read_bytes(), type=Data)
    task = table._task(place, TRIAL, 0, lambda text: None)
    cases = test_cases(place, data, task.catalogue, count=4, seed=0)
    for name in ("onerec", "tiger", "sasrec-ce"):
        recommender = METHODS[name].train(task).recommender
        for sessions in recommender.sessions(cases, 6):
            assert sessions.shape == (6, 5)
            assert all(is_legal(session, len(task.catalogue.item_ids)) for session in sessions)


@pytest.mark.slow
def test_the_command_prints_a_line_a_method_and_seed(
    report: Report, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onerec.cli import build

    monkeypatch.setattr(table, "QUICK", TRIAL)
    shutil.copytree(folder, tmp_path / "out")
    runner = CliRunner()
    options = ["table", "--quick", "--methods", "popularity,onerec", "--out", str(tmp_path / "out"), "--jobs", "1"]
    told = runner.invoke(build(), [*options, "--json", "--plot", str(tmp_path / "p.png")])
    assert [orjson.loads(line)["method"] for line in told.stdout.splitlines()] == ["popularity", "onerec"]
    assert (tmp_path / "p.png").stat().st_size > 10_000
    shown = runner.invoke(build(), options)
    assert "True reward" in shown.stdout and "Pointwise" not in shown.stdout and "OneRec" in shown.stdout
    assert "| OneRec |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    nowhere = str(tmp_path / "none" / "p.png")
    for wrong in (["--seeds", "0"], ["--methods", ","], ["--plot", nowhere], ["--data", str(tmp_path)]):
        with pytest.raises(UserError):
            runner.invoke(build(), ["table", "--quick", *wrong], catch_exceptions=False)

    def broken(task: methods.Task) -> methods.Trained:
        raise ValueError("out of tune")

    monkeypatch.setitem(METHODS, "popularity", METHODS["popularity"]._replace(train=broken))
    (tmp_path / "out" / table.LINES_FILE).unlink()
    with pytest.raises(Failure, match="popularity, seed 0: ValueError: out of tune"):
        runner.invoke(build(), [*options, "--methods", "popularity"], catch_exceptions=False)


def line(method: str, seed: int, swt: float) -> Line:
    """A line whose only news is its watch time."""
    told = {target: {"mean": swt, "max": 2 * swt, "first": swt} for target in TARGETS}
    numbers = dict.fromkeys(
        ("hr@5", "hr@10", "ndcg@5", "ndcg@10", "session_hit", "session_ndcg", "legal", "coverage", "diversity",
         "new_items", "seconds"), 0.5,
    )
    return Line(method, seed, {"method": method, "seed": seed, "reward": told, "true_reward": None, **numbers})


def test_tables_give_mean_and_deviation_over_seeds_and_pairs_by_seed(tmp_path: Path) -> None:
    lines = [line("onerec", 0, 0.10), line("onerec", 1, 0.20), line("onerec+ipa", 0, 0.13), line("onerec+ipa", 1, 0.23)]
    found = {row.method: row for row in summaries(lines)}
    assert found["onerec"].values["reward.swt.mean"] == pytest.approx((0.15, 0.1 / 2**0.5))
    paired = against_reference(lines, ["reward.swt.mean"])
    assert list(paired) == ["onerec+ipa"]
    assert paired["onerec+ipa"]["reward.swt.mean"] == pytest.approx((0.03, 0.0), abs=1e-12)
    text = markdown(lines)
    assert "True reward" not in text
    assert "| OneRec | 0.1500±0.0707 |" in text and "| OneRec+IPA | **0.1800±0.0707** |" in text
    assert "+0.0300±0.0000" in text
    plot(lines, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
