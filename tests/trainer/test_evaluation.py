"""`onerec evaluate`: sessions that were not learnt, beside baselines that learnt the same; clear refusals."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

from onerec.cli import build
from onerec.config import Config, load_config
from onerec.errors import UserError
from simulator.log import write_world
from simulator.world import DAY_MS, World, WorldConfig
from streaming.item_files import read_items
from streaming.replay import Replay
from streaming.store import Reader, Store
from trainer import presets
from trainer.baselines import PopularityRanker
from trainer.checkpoint import latest_checkpoint
from trainer.evaluation import evaluate_run
from trainer.items import build_catalogue, load_catalogue
from trainer.loop import train

WORLD = WorldConfig(users=40, items=120, days=2, seed=2)
SPEC = "users=40,items=120,days=2,seed=2"
SMALL = msgspec.structs.replace(
    presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, experts=2
)
SETTINGS = ["catalogue.levels=2", "catalogue.codes=16", "train.threads=1", "train.score_share=0", "train.batch_windows=16",
            "train.learning_rate=0.003", "train.precision=fp32"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path, Config]]:
    """A state whose first day a run has learnt, that run, and the log of the second day."""
    folder = tmp_path_factory.mktemp("evaluation")
    events, items, state, run = folder / "e.jsonl", folder / "i.jsonl", folder / "state", folder / "run"
    write_world(World(WORLD), events, items)
    cut = WORLD.start_ms + DAY_MS
    for name, later in (("early", False), ("late", True)):
        lines = [line for line in events.read_bytes().splitlines(True) if (orjson.loads(line)["ts"] >= cut) == later]
        (folder / f"{name}.jsonl").write_bytes(b"".join(lines))
    config = load_config(None, SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", SMALL)
        with Store(state, config.semantics) as store:
            for batch in read_items(str(items), [], None):
                store.put_items(batch)
            Replay(store, [str(folder / "early.jsonl")]).run()
        with Reader(state) as reader:
            build_catalogue(state, reader, config)
        train(state, run, config)
        yield state, run, folder / "late.jsonl", config


@pytest.mark.slow
def test_learnt_sessions_are_said_to_be_learnt_and_fresh_ones_are_taken_first(
    parts: tuple[Path, Path, Path, Config], tmp_path: Path
) -> None:
    state, run, late, config = parts
    before = evaluate_run(state, run, cases=5, width=4)
    assert before.learnt and before.judged[0].judgement.cases == 5

    later = tmp_path / "state"
    shutil.copytree(state, later)
    with Store(later, config.semantics) as store:
        Replay(store, [str(late)]).run()
    cursor = latest_checkpoint(run).cursor.sequence
    with Reader(later) as reader:
        fresh = [session for sequence, session in reader.sessions() if sequence > cursor and session.high_quality]
        old = [session for sequence, session in reader.sessions() if sequence <= cursor and session.high_quality]
    after = evaluate_run(later, run, cases=1000, width=4, world=World(WORLD))
    assert not after.learnt
    assert {judged.judgement.cases for judged in after.judged} == {len(fresh)}
    assert [judged.name for judged in after.judged] == ["popularity", "covisitation", "onerec"]

    # Popularity has learnt what the run has learnt, and nothing of the fresh sessions: by hand.
    catalogue = load_catalogue(later)
    ranker = PopularityRanker(len(catalogue.item_ids))
    ranker.fit([[catalogue.index[item.item_id] for item in session.items] for session in old])
    best = np.argsort(-ranker.log_probs([()])[0], kind="stable")[:10].tolist()
    hits = [catalogue.index[session.items[0].item_id] in best for session in fresh]
    assert after.judged[0].judgement.hr10 == pytest.approx(np.mean(hits))

    judgement = after.judged[2].judgement
    assert judgement.true_reward is not None
    for told in (judgement.true_reward, judgement.reward):
        assert told is not None and all(0 < of["mean"] <= of["max"] < 1 for of in told.values())
    assert judgement.diversity_by == "topic"


@pytest.mark.slow
def test_the_command_prints_tables_lines_and_pictures(parts: tuple[Path, Path, Path, Config], tmp_path: Path) -> None:
    state, run, _, _ = parts
    runner, options = CliRunner(), ["--state", str(parts[0]), "--run", str(run), "--cases", "4", "--width", "3"]
    told = runner.invoke(build(), ["evaluate", *options, "--world", SPEC, "--json", "--plot", str(tmp_path / "p.png")])
    lines = [orjson.loads(line) for line in told.stdout.splitlines()]
    assert [line["method"] for line in lines] == ["popularity", "covisitation", "onerec"]
    for line in lines:
        assert {"reward", "true_reward", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "legal", "coverage", "diversity", "new_items",
                "session_hit", "session_ndcg", "seconds", "learnt"} <= set(line)
        assert line["learnt"] is True
    assert (tmp_path / "p.png").stat().st_size > 10_000
    shown = runner.invoke(build(), ["evaluate", *options])
    assert "hit rate" in shown.stdout and "true reward" not in shown.stdout and "has learnt these sessions" in shown.stderr
    world = tmp_path / "world.json"
    world.write_bytes(msgspec.json.encode(WORLD))
    again = runner.invoke(build(), ["evaluate", *options, "--world", str(world), "--json"])
    assert orjson.loads(again.stdout.splitlines()[2])["true_reward"] == lines[2]["true_reward"]


@pytest.mark.slow
def test_what_cannot_be_judged_is_refused(parts: tuple[Path, Path, Path, Config], tmp_path: Path) -> None:
    state, run, _, config = parts
    with pytest.raises(UserError, match="no checkpoint.*train first"):
        evaluate_run(state, tmp_path / "nothing")
    other = tmp_path / "other"
    shutil.copytree(state, other)
    with Reader(other) as reader:
        build_catalogue(other, reader, msgspec.structs.replace(
            config, catalogue=msgspec.structs.replace(config.catalogue, codes=20)
        ))
    with pytest.raises(UserError, match="generator and reward model.*codebook.*their codes mean other items"):
        evaluate_run(other, run)
    with pytest.raises(UserError, match="not of this simulated world"):
        evaluate_run(state, run, cases=3, width=2, world=World(WorldConfig(users=3, items=120)))
    for wrong in ("users=40,height=3", "users=many", str(tmp_path / "none.json"), "users=0"):
        with pytest.raises(UserError, match="--world|--users"):
            CliRunner().invoke(
                build(), ["evaluate", "--state", str(state), "--run", str(run), "--world", wrong], catch_exceptions=False
            )
