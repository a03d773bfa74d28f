"""`onerec reinforce`: from a run to a run, the same twice, refusing what it cannot reinforce."""

import random

import msgspec
import orjson
import pytest
import torch
from typer.testing import CliRunner

from exporter.export import state_of_run
from onerec.cli import build
from onerec.config import load_config
from onerec.errors import UserError
from streaming.changes import Changes, Counters
from streaming.items import ItemRecord
from streaming.semantics import Semantics, SessionConfig
from streaming.sessions import Session, SessionItem
from streaming.store import Store
from trainer import presets
from trainer.checkpoint import latest_checkpoint, load_model, load_reward_model, load_weights
from trainer.ecpo import EcpoConfig
from trainer.loop import train
from trainer.reinforcement import STEPS_FILE, reinforce_run
from trainer.runs import read_run

ITEMS = 48
SETTINGS = ["train.batch_windows=8", "train.threads=1", "train.score_share=0.0", "train.precision=fp32",
            "train.learning_rate=0.003"]  # fmt: skip
CONFIG = EcpoConfig(users=4, group=6, format_sessions=4)


def session(number):
    rng = random.Random(number)
    start, first = 10**12 + number * 60_000, rng.randrange(ITEMS)
    ids = [f"i{(first + 8 * k) % ITEMS}" for k in range(-3, 3)]
    watched = [SessionItem(item, start + k, 9000, 9000, [], True) for k, item in enumerate(ids[3:])]
    positives = [(item.ts, item.item_id) for item in watched[:-1]]
    return Session(f"u{number}:{start}", f"u{number}", None, start, watched[-1].ts, watched, ids[:3], len(watched),
                   9000 * len(watched), 0, True, 0.1, 1.0, 0, number % 2, positives)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    patch = pytest.MonkeyPatch()
    tiny = msgspec.structs.replace(
        presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, experts=2
    )
    patch.setitem(presets.PRESETS, "tiny", tiny)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def state(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ecpo") / "state"
    rng = random.Random(0)
    items = [
        ItemRecord(item_id=f"i{i}", ts=10**12, duration_ms=10_000, tags=[str(i % 8)],
                   embedding=[float(i % 8 == k) + 0.2 * rng.random() for k in range(8)])
        for i in range(ITEMS)
    ]  # fmt: skip
    with Store(folder, Semantics(session=SessionConfig(target_items=3))) as store:
        core = store.core()
        core.counters = Counters(events=64, sessions=64, high_quality=64)
        store.put_items(items)
        store.commit(core, Changes({}, [session(number) for number in range(64)], [], []), {})
    return folder


@pytest.fixture(scope="module")
def run(state):
    folder = state.parent / "run"
    train(state, folder, load_config(None, SETTINGS))
    return folder


def reinforced(state, run, out, **options):
    return reinforce_run(state, run, out, CONFIG, **{"steps": 3, "threads": 1, **options})


def test_the_result_is_a_run_that_goes_on_and_carries_the_reward_model(state, run, tmp_path):
    stage, steps = reinforced(state, run, tmp_path / "out")
    before, after = latest_checkpoint(run), latest_checkpoint(tmp_path / "out")
    assert after.step == before.step + 3 * CONFIG.updates and stage.checkpoint == str(after.path)
    assert (after.cursor, after.watermark, after.codebook_version) == (
        before.cursor, before.watermark, before.codebook_version,
    )  # fmt: skip
    old, new = load_weights(before), load_model(after).state_dict()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    mine, theirs = (load_reward_model(checkpoint).state_dict() for checkpoint in (after, before))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    lines = [orjson.loads(line) for line in (tmp_path / "out" / STEPS_FILE).read_bytes().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and len(lines[0]["entropy"]) == 3
    assert stage.windows == 64 and len(steps) == 3
    assert read_run(tmp_path / "out").codebook_version == before.codebook_version
    assert state_of_run(tmp_path / "out") == state
    result = train(state, tmp_path / "out", load_config(None, SETTINGS))
    assert result.steps == after.step and result.sessions == 64


def test_same_arguments_give_the_same_bytes(state, run, tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        reinforced(state, run, tmp_path / name, seed=seed, steps=2)
    one, same, other = (latest_checkpoint(tmp_path / name).files["model.safetensors"] for name in ("one", "same", "other"))
    assert one == same != other


def test_a_stop_ends_after_the_step_with_a_checkpoint(state, run, tmp_path):
    stage, _ = reinforced(state, run, tmp_path / "out", stopped=lambda: True)
    assert stage.steps == 1 and latest_checkpoint(tmp_path / "out").step == latest_checkpoint(run).step + CONFIG.updates


def test_what_cannot_be_reinforced_is_refused_before_anything_is_written(state, run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not a training run"):
        reinforced(state, tmp_path / "nowhere", out)
    with pytest.raises(UserError, match="holds a run already"):
        reinforced(state, run, run)
    plain = tmp_path / "plain"
    train(state, plain, load_config(None, [*SETTINGS, "reward.train=false"]))
    with pytest.raises(UserError, match="no reward model"):
        reinforced(state, plain, out)
    assert not out.exists()


def test_the_command_takes_a_users_reward_and_draws(state, run, tmp_path, monkeypatch):
    cap = tmp_path / "cap.py"
    cap.write_text("def cap(items):\n    return -float(sum(int(item[1:]) % 8 == 0 for item in items) > 1)\n")
    plot = tmp_path / "stage.png"
    words = ["reinforce", "--state", str(state), "--run", str(run), "--steps", "2", "--plot", str(plot)]
    done = CliRunner().invoke(build(), [*words, "--out", str(tmp_path / "out"), "--industrial", f"{cap}:cap", "--json"])
    assert done.exit_code == 0, done.output
    result = orjson.loads(done.stdout.strip().splitlines()[-1])
    assert result["steps"] == 2 and result["faults"] == 0 and -1.0 <= result["industrial"][0] <= 0.0
    assert plot.stat().st_size > 10_000
    for wrong in (["--industrial", f"{cap}:nothing"], ["--learning-rate", "0"], ["--plot", "/nowhere/x.png"]):
        refused = CliRunner().invoke(build(), [*words, "--out", str(tmp_path / "no"), *wrong])
        assert isinstance(refused.exception, UserError)
    assert not (tmp_path / "no").exists()
