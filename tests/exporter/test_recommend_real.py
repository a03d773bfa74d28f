"""The whole way with every part real: log, catalogue, model, graph, bundle, Triton, command line; same sessions in all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from release_helpers import World as SmallWorld
from typer.testing import CliRunner

from exporter.bundle import verify_bundle
from exporter.client import Client
from exporter.parity import torch_rewards
from exporter.publish import load_repository
from exporter.repository import Repository
from exporter.server import TritonServer
from onerec.cli import build
from onerec.errors import Failure, OneRecError, UserError
from serving_config.recommend.engine import Engine, Sessions, Wanted
from serving_config.recommend.graphs import pad
from streaming.store import Reader
from trainer.beam import beam_search, trie_tensors
from trainer.checkpoint import Checkpoint, Cursor, load_checkpoint, load_model, load_reward_model, save_checkpoint
from trainer.config import ModelConfig, RewardConfig, RewardModelConfig
from trainer.items import load_catalogue
from trainer.model import OneRec
from trainer.reward import RewardModel
from trainer.reward_weights import combine_array

pytestmark = pytest.mark.slow

WIDTH = 12
START = Callable[..., tuple[TritonServer, Client]]


def call(*arguments: str | Path) -> str:
    """Standard output of an `onerec` command that must succeed."""
    result = CliRunner().invoke(build(), [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


class World(NamedTuple):
    folder: Path
    server: TritonServer
    client: Client

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    def publish(self, *more: str | Path) -> dict:
        out = call(
            "publish", "--run", self.run, "--repository", self.repository, "--server", self.server.url,
            "--set", f"beam.width={WIDTH}", "--json", *more,
        )  # fmt: skip
        return json.loads(out.splitlines()[-1])


def checkpoint(
    run: Path, state: Path, *, step: int, seed: int, codebook: str | None = None, reward: RewardModelConfig | None = None
) -> Checkpoint:
    """An untrained small model, and perhaps a reward model, as a checkpoint of a run on the state's catalogue."""
    catalogue = load_catalogue(state)
    config = ModelConfig(
        d_model=16, heads=2, d_ff=16, encoder_layers=1, decoder_layers=1, experts=2, levels=catalogue.levels,
        codes=catalogue.codes, session_items=3, history_length=20,
    )  # fmt: skip
    torch.manual_seed(seed)
    weights = OneRec(config).state_dict()
    reward_weights = None
    if reward is not None:
        reward_model = RewardModel(reward)
        with torch.no_grad():
            for parameter in reward_model.towers.parameters():
                parameter.normal_()
        reward_weights = reward_model.state_dict()
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps({"state": str(state)}))
    return save_checkpoint(
        run,
        Checkpoint(
            step=step, cursor=Cursor(), watermark=step * 1_000, codebook_version=codebook or catalogue.version,
            items=len(catalogue.item_ids), model_config=config, session_items=3, metrics_bytes=0, score=None,
            counters={}, created_ms=0, reward_config=reward,
        ),  # fmt: skip
        weights,
        {},
        reward_weights,
    )


def reward_config(state: Path, **changes: int) -> RewardModelConfig:
    """A small reward model for the codes of the state's catalogue."""
    catalogue = load_catalogue(state)
    fits = {"levels": catalogue.levels, "codes": catalogue.codes, "session_items": 3}
    return RewardModelConfig(**{"dimension": 8, "heads": 2, "buckets": 40, "history_length": 6, **fits, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, start_triton: START, small_world: SmallWorld) -> World:
    """A simulated world, replayed, its catalogue fitted, an untrained model published to a running server."""
    folder = tmp_path_factory.mktemp("world")
    log = folder / "events.jsonl"
    call("simulate", "--out", log, "--users", "40", "--items", "60", "--days", "1", "--seed", "3")
    call("replay", log, "--state", folder / "state", "--items", folder / "events.items.jsonl", "--json")
    call("items", "--state", folder / "state", "--json", "--set", "catalogue.codes=8")
    checkpoint(folder / "run", folder / "state", step=1, seed=1)
    # The same architecture as that of the small world: it need not be traced again.
    traced = small_world.repository / ".onerec" / "templates"
    shutil.copytree(traced, folder / "repository" / ".onerec" / "templates")
    server, client = start_triton(folder / "repository", folder / "state")
    load_repository(folder / "repository", client)
    made = World(folder, server, client)
    assert made.publish()["version"] == 1
    return made


def by_torch(world: World, step: int, history: list[str]) -> tuple[list[list[str]], list[float]]:
    """All live sessions of the torch search for a history, as item ids, with their scores."""
    found = load_checkpoint(world.run / "checkpoints" / f"{step:09d}")
    snapshot = Engine(world.repository / "recommend" / str(Repository(world.repository).versions()[-1])).snapshot
    row = {item: place for place, item in enumerate(snapshot.item_ids)}
    codes = snapshot.item_codes[[row[item] for item in history if item in row][-20:]].astype(np.int64)
    length = max(1, len(codes))
    history_codes, mask = torch.zeros(1, length, codes.shape[-1], dtype=torch.int64), torch.zeros(1, length).bool()
    history_codes[0, : len(codes)] = torch.from_numpy(codes)
    mask[0, : len(codes)] = True
    beams = beam_search(load_model(found), trie_tensors(snapshot.trie), history_codes, mask, width=WIDTH)
    leaves = beams.leaves[0][beams.alive[0]].numpy()
    rows = snapshot.trie.session_rows(leaves).tolist()
    return [[snapshot.item_ids[place] for place in session] for session in rows], beams.scores[0].tolist()


def test_torch_onnx_runtime_and_triton_give_the_same_sessions_in_the_same_order(world: World) -> None:
    newest = Repository(world.repository).versions()[-1]
    engine = Engine(world.repository / "recommend" / str(newest))
    step = engine.manifest.step
    with Reader(world.state) as reader:
        stored = dict(reader.users())
    users = sorted(stored, key=lambda user: len(stored[user]))
    for user in [users[0], users[len(users) // 2], users[-1]]:
        sessions, scores = by_torch(world, step, stored[user])
        answer = world.client.recommend(user, count=WIDTH)
        assert answer.items == sessions
        assert answer.scores == pytest.approx(scores, abs=1e-4)
        [direct] = engine.answer([Wanted(history=engine.history(stored[user]).codes, count=WIDTH)])
        assert isinstance(direct, Sessions)
        assert [[item.decode() for item in session] for session in direct.items] == sessions
        assert world.client.recommend(history=stored[user], count=WIDTH).items == sessions
        for session in sessions:
            assert len(set(session)) == len(session)


def test_a_new_checkpoint_is_served_without_a_new_trace(world: World) -> None:
    before = world.client.recommend(history=[], count=WIDTH)
    checkpoint(world.run, world.state, step=2, seed=2)
    published = world.publish()
    assert "template" not in published["seconds"]
    answer = world.client.recommend(history=[], count=WIDTH)
    assert (answer.model_version, answer.watermark) == (published["version"], 2_000)
    assert answer.items == by_torch(world, 2, [])[0] != before.items


def test_items_that_came_since_are_served_by_the_next_version(world: World, tmp_path: Path) -> None:
    known = len(load_catalogue(world.state).item_ids)
    entries = [json.loads(line) for line in (world.folder / "events.items.jsonl").read_text().splitlines()]
    fresh = {**entries[0], "item_id": "brand-new", "ts": max(entry["ts"] for entry in entries)}
    (tmp_path / "new.jsonl").write_text(json.dumps(fresh) + "\n")
    call("replay", tmp_path / "new.jsonl", "--state", world.state, "--json")
    assert world.publish()["items"] == known + 1
    engine = Engine(Repository(world.repository).folder(Repository(world.repository).versions()[-1]))
    assert "brand-new" in engine.snapshot.item_ids
    assert engine.history(["brand-new"]).unknown == 0


def test_weights_of_an_unknown_codebook_are_refused_and_the_served_version_stays(world: World) -> None:
    before = world.client.recommend(history=[])
    other = world.folder / "other-run"
    checkpoint(other, world.state, step=9, seed=1, codebook="0123456789abcdef")
    with pytest.raises(UserError, match="mixed versions.*0123456789abcdef"):
        call("publish", "--run", other, "--repository", world.repository, "--server", world.server.url)
    assert world.client.recommend(history=[]) == before


def test_a_rebuilt_catalogue_does_not_disturb_a_run_on_the_one_before(world: World, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(world.state, state)
    version = load_catalogue(state).version
    call("items", "--state", state, "--json", "--build", "--set", "catalogue.codes=8", "--set", "catalogue.seed=5")
    assert load_catalogue(state).version != version
    call("export", "--run", world.run, "--state", state, "--out", tmp_path / "out", "--set", f"beam.width={WIDTH}")
    assert verify_bundle(tmp_path / "out").codebook_version == version


def test_recommend_shows_what_the_catalogue_says(world: World) -> None:
    items = {}
    for line in call("items", "--state", world.state, "--list", "--json").splitlines():
        entry = json.loads(line)
        items[entry["item_id"]] = entry
    arguments = ["--server", world.server.url, "--repository", world.repository, "--state", world.state]
    with Reader(world.state) as reader:
        user, watermark = next(reader.users())[0], reader.watermark()
    answer = json.loads(call("recommend", user, "--count", "2", "--json", *arguments))
    assert watermark is not None and answer["behind_newest_event_ms"] >= watermark - answer["watermark"]
    assert len(answer["sessions"]) == 2
    for session in answer["sessions"]:
        for item in session["items"]:
            assert item["codes"] == items[item["item_id"]]["codes"]
            assert item["tags"] == items[item["item_id"]]["tags"]
    table = call("recommend", "--history", "", *arguments)
    first = world.client.recommend(history=[]).items[0][0]
    assert first in table and "has learnt up to" in table and "behind the newest event" in table


def test_wrong_questions_on_the_command_line_are_user_errors(world: World) -> None:
    for arguments in (["u1", "--history", "a"], [], ["--history", "a,,b"], ["u1", "--count", "1000"]):
        with pytest.raises(UserError):
            call("recommend", *arguments, "--server", world.server.url)
    with pytest.raises(OneRecError, match="does not answer"):
        call("recommend", "u1", "--server", "127.0.0.1:9")


def test_versions_and_rollback_by_command(world: World) -> None:
    checkpoint(world.run, world.state, step=5, seed=5)
    version = world.publish()["version"]
    place = ["--repository", world.repository, "--server", world.server.url, "--json"]
    left = json.loads(call("rollback", *place, "--reason", "bad"))
    assert left == {"left": [version], "serving": version - 1}
    listed = json.loads(call("versions", "--repository", world.repository, "--server", world.server.url, "--json"))
    found = {entry["version"]: entry for entry in listed}
    assert found[version]["state"] == "rolled back" and found[version - 1]["state"] == "serving"
    assert found[version - 1]["triton"] == "READY" and found[version]["watermark"] == 5_000
    assert "rolled back" in call("versions", "--repository", world.repository)
    with pytest.raises(Failure, match=r"on hold.*\(bad\).*onerec promote"):
        world.publish()
    call("promote", *place, "--reason", "mended")
    assert world.publish()["version"] == version + 1


def test_the_reward_model_of_a_checkpoint_chooses_through_triton_as_in_torch(world: World) -> None:
    checkpoint(world.run, world.state, step=6, seed=6, reward=reward_config(world.state))
    weights = RewardConfig(swt=1, vtr=0, wtr=2, ltr=0.5)
    out = world.publish("--set", "reward.swt=1", "--set", "reward.vtr=0", "--set", "reward.wtr=2", "--set", "reward.ltr=0.5")
    engine = Engine(Repository(world.repository).folder(out["version"]))
    manifest = engine.manifest
    assert manifest.reward is not None and manifest.reward.parity.sessions == WIDTH
    reward_model = load_reward_model(load_checkpoint(world.run / "checkpoints" / f"{6:09d}"))
    assert reward_model is not None
    row = {item: place for place, item in enumerate(engine.snapshot.item_ids)}
    changed = 0
    for history in ([], ["v1"], [f"v{number}" for number in range(15)]):
        sessions, scores = by_torch(world, 6, history)
        codes = engine.snapshot.item_codes[[[row[item] for item in session] for session in sessions]][None].astype(np.int64)
        rewards = torch_rewards(reward_model, [engine.history(history).codes], codes)[0]
        told = world.client.recommend(history=history, count=WIDTH)
        assert told.items == sessions
        assert np.allclose(told.rewards, rewards, atol=1e-5)
        order = np.argsort(-combine_array(rewards, weights), kind="stable")
        chosen = world.client.recommend(history=history, count=3, select="reward")
        assert chosen.items == [sessions[place] for place in order[:3]]
        assert chosen.scores == pytest.approx([scores[place] for place in order[:3]], abs=1e-4)
        assert np.allclose(chosen.rewards, rewards[order[:3]], atol=1e-5)
        changed += chosen.items[0] != sessions[0]
    assert changed, "the choice made no difference, so nothing was shown"
    shown = call("recommend", "--history", "v1", "--select", "reward", "--count", "2", "--server", world.server.url, "--json")
    best = world.client.recommend(history=["v1"], count=2, select="reward")
    found = json.loads(shown)["sessions"]
    assert [[item["item_id"] for item in session["items"]] for session in found] == best.items
    assert [session["rewards"] for session in found] == best.rewards
    table = call("recommend", "--history", "v1", "--select", "reward", "--server", world.server.url)
    assert best.items[0][0] in table and f"{best.rewards[0][2]:.3f}" in table and "wtr" in table  # type: ignore[index]
    checkpoint(world.run, world.state, step=7, seed=6, reward=reward_config(world.state))
    assert not any("template" in step for step in world.publish()["seconds"]), "a second publish traces nothing"


def test_a_reward_model_of_other_codes_or_without_weights_is_refused(world: World) -> None:
    before = world.client.recommend(history=[])
    other = world.folder / "other-codes"
    checkpoint(other, world.state, step=1, seed=1, reward=reward_config(world.state, codes=16))
    with pytest.raises(UserError, match="mixed versions: the reward model reads 3 levels of 16 codes"):
        call("publish", "--run", other, "--repository", world.repository, "--server", world.server.url)
    nothing = ["--set", "reward.swt=0", "--set", "reward.vtr=0", "--set", "reward.wtr=0", "--set", "reward.ltr=0"]
    with pytest.raises(UserError, match="all 0"):
        call("publish", "--run", world.run, "--repository", world.repository, "--server", world.server.url, *nothing)
    assert world.client.recommend(history=[]) == before


def test_new_events_of_a_user_change_the_next_answer(world: World, tmp_path: Path) -> None:
    newest = Repository(world.repository).versions()[-1]
    engine = Engine(world.repository / "recommend" / str(newest))
    with Reader(world.state) as reader:
        watermark = reader.watermark()
    events = [{"type": "like", "user_id": "late-comer", "item_id": item, "ts": watermark} for item in ("v1", "v2")]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    call("replay", tmp_path / "more.jsonl", "--state", world.state, "--json")
    time.sleep(0.2)
    expected = by_torch(world, engine.manifest.step, ["v1", "v2"])[0]
    assert world.client.recommend("late-comer", count=WIDTH).items == expected


def test_the_graph_for_the_cpu_is_the_traced_one(world: World) -> None:
    folder = Repository(world.repository).folder(Repository(world.repository).versions()[-1]) / "graph"
    import onnxruntime as ort

    engine = Engine(folder.parent)
    histories = [engine.history(["v1", "v2", "v3"]).codes, engine.history([]).codes]
    optimised = engine.search(histories)
    plain = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    codes, mask = pad(histories, engine.snapshot.trie.levels)
    leaves, scores = plain.run(
        ["leaves", "scores"], {"history": codes, "history_mask": mask, **engine.snapshot.trie.arrays()}
    )
    assert np.array_equal(leaves, optimised.leaves)
    assert np.allclose(scores, optimised.scores, atol=1e-4)


def test_plain_models_are_what_tritons_onnx_runtime_backend_reads(world: World, tmp_path: Path) -> None:
    import onnxruntime as ort
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    step = Engine(Repository(world.repository).folder(Repository(world.repository).versions()[-1])).manifest.step
    call("export", "--plain", "--run", world.run, "--out", tmp_path / "plain", "--set", f"beam.width={WIDTH}")
    config = text_format.Parse((tmp_path / "plain" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.name, config.backend) == ("plain", "onnxruntime")
    session = ort.InferenceSession(tmp_path / "plain" / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    levels = load_catalogue(world.state).levels
    feed = {"history": np.zeros((1, 1, levels), np.int64), "history_mask": np.zeros((1, 1), bool)}
    [items] = session.run(["items"], feed)
    assert [list(row) for row in items[0] if row[0]] == by_torch(world, step, [])[0]
