"""Checkpoints are whole or absent, and what goes in comes out."""

import hashlib
from pathlib import Path

import msgspec
import pytest
import torch

from onerec.errors import Failure, UserError
from trainer.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    STAGING_PREFIX,
    STATE_FILE,
    Checkpoint,
    Cursor,
    best_step,
    checkpoint_folder,
    checkpoint_steps,
    flatten_state,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    unflatten_state,
)
from trainer.config import ModelConfig


def record(step: int, score: float | None = None) -> Checkpoint:
    return Checkpoint(
        step=step, cursor=Cursor(sequence=7), watermark=None, codebook_version="abc", items=3,
        model_config=ModelConfig(d_model=8, heads=2), session_items=5, metrics_bytes=12, score=score,
        counters={"sessions": 7}, created_ms=0,
    )


WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}
OPTIMIZER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}},
    "groups": [{"lr": 2e-4, "betas": (0.9, 0.95)}],
}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    written = save_checkpoint(tmp_path, record(41), WEIGHTS, OPTIMIZER)
    loaded = load_checkpoint(checkpoint_folder(tmp_path, 41))
    assert loaded == written
    assert loaded.path == tmp_path / "checkpoints" / "000000041"
    weights = load_weights(loaded)
    assert weights.keys() == WEIGHTS.keys() and all(torch.equal(weights[k], WEIGHTS[k]) for k in WEIGHTS)
    optimizer = load_optimizer(loaded)
    assert optimizer["groups"] == OPTIMIZER["groups"]
    assert torch.equal(optimizer["state"][0]["exp_avg"], torch.ones(2))


def test_a_checkpoint_from_before_lineage_was_kept_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, record(41), WEIGHTS, OPTIMIZER)
    path = checkpoint_folder(tmp_path, 41) / STATE_FILE
    content = msgspec.json.decode(path.read_bytes())
    for name in ("source", "code_version", "config_sha256", "sha256"):
        del content[name]
    content["sha256"] = hashlib.sha256(msgspec.json.encode(content)).hexdigest()
    path.write_bytes(msgspec.json.encode(content))
    loaded = load_checkpoint(path.parent)
    assert loaded.step == 41 and loaded.source == {} and loaded.code_version is loaded.config_sha256 is None


def test_flattening_keeps_types_and_integer_keys() -> None:
    nest = {"x": [1, (2.5, None), {3: "s"}], "empty": {}, "flag": True}
    tensors, skeleton = flatten_state(nest)
    assert tensors == {} and unflatten_state(tensors, skeleton) == nest


def test_what_needs_pickle_is_refused() -> None:
    with pytest.raises(Failure, match="pickle"):
        flatten_state({"x": object()})


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(tmp_path, record(1), WEIGHTS, OPTIMIZER)
    save_checkpoint(tmp_path, record(2), WEIGHTS, OPTIMIZER)
    file = checkpoint_folder(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-3])
    else:
        file.unlink()
    checkpoint, faults = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1
    assert len(faults) == 1 and name in faults[0] and "000000002" in faults[0]


def test_every_bit_of_the_record_is_guarded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, record(1), WEIGHTS, OPTIMIZER)
    file = checkpoint_folder(tmp_path, 1) / STATE_FILE
    file.write_bytes(file.read_bytes().replace(b'"step":1', b'"step":9'))
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(file.parent)


def test_no_checkpoint_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="onerec train"):
        latest_checkpoint(tmp_path)


def test_an_unfinished_write_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, record(1), WEIGHTS, OPTIMIZER)
    (tmp_path / "checkpoints" / f"{STAGING_PREFIX}000000002").mkdir()
    assert checkpoint_steps(tmp_path) == [1]
    assert latest_checkpoint(tmp_path).step == 1
    prune_checkpoints(tmp_path, keep=3)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000001"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step, score in enumerate([4.0, 1.0, None, 3.0, 2.0, 5.0]):
        save_checkpoint(tmp_path, record(step, score), WEIGHTS, OPTIMIZER)
    prune_checkpoints(tmp_path, keep=2)
    assert checkpoint_steps(tmp_path) == [1, 4, 5]


def test_best_is_the_lowest_score_and_the_newest_of_equals() -> None:
    assert best_step({1: 2.0, 2: 1.0, 3: 1.0, 4: None}) == 3
    assert best_step({1: None}) is None


def test_a_disk_that_refuses_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, record(1), WEIGHTS, OPTIMIZER)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.checkpoint.sync_path", full)
    with pytest.raises(Failure, match="No space left"):
        save_checkpoint(tmp_path, record(2), WEIGHTS, OPTIMIZER)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000001"]
