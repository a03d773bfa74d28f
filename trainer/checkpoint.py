"""Checkpoints: weights, optimiser and place in the log, written whole or not at all, without pickle."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from onerec.errors import Failure, UserError
from onerec.files import sha256_of, sync_path
from trainer.config import ModelConfig, RewardModelConfig

if TYPE_CHECKING:
    import torch

    from trainer.model import OneRec
    from trainer.reward import RewardModel

FORMAT = 2
MODEL_FILE = "model.safetensors"
REWARD_FILE = "reward.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "checkpoint.json"
STAGING_PREFIX = ".writing-"


class Cursor(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A place in the session log: everything up to and including the session of commit number `sequence` is learnt.

    A batch never splits a session, so no place within one is needed. `round` counts the passes over the backlog
    (`train.backlog_passes`); it stays 0 in a run that trains each session once.
    """

    round: int = 0
    sequence: int = 0


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint says of itself; `path` is its folder, the tensors lie beside it.

    `watermark` is the event time in ms learnt up to (None: nothing yet), `items` the rows of the catalogue known then,
    `metrics_bytes` the length of RUN/metrics.jsonl, `score` the mean test-then-train loss since the checkpoint before.
    `version` counts the checkpoints of the run, `pairs` is the last record of the pair log that was taken, `rewards_bytes`
    the length of RUN/rewards.bin, `reward_config` the reward model's architecture (None: the run has none).
    Lineage: `source` has the positions that the state had reached, by source, when the batch was read, as
    `streaming.store.Reader.positions` gives them; `code_version` is `onerec.versions.code_version`, `config_sha256` that of
    RUN/run.json. As `created_ms` they tell of the life that wrote them; checkpoints from before lack them.
    """

    step: int
    cursor: Cursor
    watermark: int | None
    codebook_version: str
    items: int
    model_config: ModelConfig
    session_items: int
    metrics_bytes: int
    score: float | None
    counters: dict[str, int]
    created_ms: int
    version: int = 1
    pairs: int = 0
    rewards_bytes: int = 0
    reward_config: RewardModelConfig | None = None
    source: dict[str, Any] = {}
    code_version: str | None = None
    config_sha256: str | None = None
    optimizer: Any = None
    files: dict[str, str] = {}
    format: int = FORMAT
    path: Path = Path()


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """RUN/checkpoints/<step, nine digits>."""
    return run_dir / "checkpoints" / f"{step:09d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps that have a complete folder, ascending."""
    root = run_dir / "checkpoints"
    if not root.is_dir():
        return []
    return sorted(int(entry.name) for entry in root.iterdir() if entry.is_dir() and entry.name.isdigit())


class _Version(msgspec.Struct):
    """What a look at a checkpoint asks of its record."""

    version: int


def newest_version(run_dir: Path) -> int | None:
    """Version of the newest checkpoint, taken at its word; None where there is none, or it was pruned meanwhile."""
    steps = checkpoint_steps(run_dir)
    try:
        content = (checkpoint_folder(run_dir, steps[-1]) / STATE_FILE).read_bytes() if steps else b""
        return msgspec.json.decode(content, type=_Version).version
    except (OSError, msgspec.DecodeError):
        return None


def flatten_state(state: Any, prefix: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Any nest of dicts, lists, numbers and tensors as (tensors by path, JSON skeleton); `unflatten_state` reverses it.

    Dict keys that are integers (Adam's parameter indices) are kept as integers by the skeleton.
    """
    import torch

    if isinstance(state, torch.Tensor):
        return {prefix: state.detach().contiguous().cpu()}, {"tensor": prefix}
    if isinstance(state, Mapping):
        tensors: dict[str, torch.Tensor] = {}
        pairs = []
        for key, value in state.items():
            inner, skeleton = flatten_state(value, f"{prefix}.{key}" if prefix else str(key))
            tensors.update(inner)
            pairs.append([key, skeleton])
        return tensors, {"dict": pairs}
    if isinstance(state, (list, tuple)):
        tensors = {}
        items = []
        for place, value in enumerate(state):
            inner, skeleton = flatten_state(value, f"{prefix}.{place}" if prefix else str(place))
            tensors.update(inner)
            items.append(skeleton)
        return tensors, {"list": items} if isinstance(state, list) else {"tuple": items}
    if state is None or isinstance(state, (bool, int, float, str)):
        return {}, {"value": state}
    raise Failure(f"checkpoint: {type(state).__name__} at {prefix or 'the top'} cannot be saved without pickle")


def unflatten_state(tensors: Mapping[str, torch.Tensor], skeleton: Any) -> Any:
    """The nest that `flatten_state` took apart."""
    [(kind, content)] = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten_state(tensors, value) for key, value in content}
    if kind == "list":
        return [unflatten_state(tensors, value) for value in content]
    if kind == "tuple":
        return tuple(unflatten_state(tensors, value) for value in content)
    return content


def save_checkpoint(
    run_dir: Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    reward_weights: Mapping[str, torch.Tensor] | None = None,
) -> Checkpoint:
    """Write a checkpoint into a staging folder, force it to the disk and rename it; returns it with files and path.

    A process killed at any moment leaves either no folder of this step or a complete one. Raises Failure where the
    disk refuses, naming the folder; what was saved before stays as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = checkpoint_folder(run_dir, checkpoint.step)
    staging = target.parent / f"{STAGING_PREFIX}{target.name}"
    tensors, skeleton = flatten_state(optimizer)
    contents = {MODEL_FILE: weights, OPTIMIZER_FILE: tensors}
    if reward_weights is not None:
        contents[REWARD_FILE] = reward_weights
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for file, content in contents.items():
            save_file({name: value.detach().contiguous().cpu() for name, value in content.items()}, staging / file)
        files = {name: sha256_of(staging / name) for name in contents}
        written = msgspec.structs.replace(checkpoint, optimizer=skeleton, files=files, path=target)
        record = msgspec.to_builtins(msgspec.structs.replace(written, path=Path()), enc_hook=str)
        del record["path"]
        record["sha256"] = _record_digest(record)
        (staging / STATE_FILE).write_bytes(msgspec.json.encode(record))
        for name in (*contents, STATE_FILE):
            sync_path(staging / name)
        sync_path(staging)
        # A folder of this step can only be a corrupt one that a resume fell back from.
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
        sync_path(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise Failure(
            f"checkpoint of step {checkpoint.step} could not be written to {target}: {reason}; "
            "free space or mend permissions, then start the same command again"
        ) from error
    return written


def _record_digest(record: Mapping[str, Any]) -> str:
    """sha256 over the record without its own digest, so that a flipped bit anywhere is seen."""
    return hashlib.sha256(msgspec.json.encode({k: v for k, v in record.items() if k != "sha256"})).hexdigest()


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, its files checked against their sha256.

    Raises UserError for a folder that is missing, damaged or of another format; the text says which file.
    """
    try:
        record = msgspec.json.decode((path / STATE_FILE).read_bytes())
        if not isinstance(record, dict) or record.get("sha256") != _record_digest(record):
            raise UserError(f"checkpoint {path}: {STATE_FILE} is damaged; delete the folder to use the one before it")
        if record.get("format") != FORMAT:
            raise UserError(
                f"checkpoint {path} has format {record.get('format')}, this version reads {FORMAT}; start a new --run"
            )
        del record["sha256"]
        checkpoint = msgspec.convert(record | {"path": str(path)}, Checkpoint, dec_hook=lambda kind, value: kind(value))
        for name, digest in checkpoint.files.items():
            if sha256_of(path / name) != digest:
                raise UserError(f"checkpoint {path}: {name} is damaged; delete the folder to use the one before it")
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror} ({error.filename})") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"checkpoint {path}: {STATE_FILE} is damaged ({error}); delete the folder to use the one before it"
        ) from None
    return checkpoint


def newest_checkpoint(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint (None: none yet) and, in words, which newer ones were passed over and why."""
    faults: list[str] = []
    for step in reversed(checkpoint_steps(run_dir)):
        try:
            return load_checkpoint(checkpoint_folder(run_dir, step)), faults
        except UserError as error:
            faults.append(str(error))
    return None, faults


def latest_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest sound checkpoint of a run; raises UserError with the remedy where there is none."""
    checkpoint, faults = newest_checkpoint(run_dir)
    if checkpoint is None:
        reason = f" ({faults[0]})" if faults else ""
        raise UserError(f"{run_dir} holds no checkpoint{reason}; train first: onerec train --state DIR --run {run_dir}")
    return checkpoint


def best_step(scores: Mapping[int, float | None]) -> int | None:
    """The step of the lowest score, the newest of equals; None where no step has one."""
    scored = [(score, -step) for step, score in scores.items() if score is not None]
    return -min(scored)[1] if scored else None


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one; leftovers of killed writes go too."""
    scores: dict[int, float | None] = {}
    for step in checkpoint_steps(run_dir):
        try:
            record = msgspec.json.decode((checkpoint_folder(run_dir, step) / STATE_FILE).read_bytes())
            scores[step] = record.get("score")
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, AttributeError):
            scores[step] = None
    kept = {*sorted(scores)[-keep:], best_step(scores)}
    for step in scores:
        if step not in kept:
            # Renamed first: a reader never sees half a folder under a step's name.
            doomed = run_dir / "checkpoints" / f"{STAGING_PREFIX}{step:09d}"
            shutil.rmtree(doomed, ignore_errors=True)
            checkpoint_folder(run_dir, step).rename(doomed)
    for leftover in (run_dir / "checkpoints").glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def load_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights by parameter name, on the CPU."""
    from safetensors.torch import load_file

    return load_file(checkpoint.path / MODEL_FILE)


def load_optimizer(checkpoint: Checkpoint) -> Any:
    """The optimiser's nest as it was given to `save_checkpoint`."""
    from safetensors.torch import load_file

    return unflatten_state(load_file(checkpoint.path / OPTIMIZER_FILE), checkpoint.optimizer)


def load_model(checkpoint: Checkpoint) -> OneRec:
    """The model of a checkpoint, fp32 on the CPU, in evaluation mode."""
    from trainer.model import OneRec

    model = OneRec(checkpoint.model_config)
    model.load_state_dict(load_weights(checkpoint))
    return model.eval()


def load_reward_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The reward model's weights by parameter name, on the CPU; the checkpoint must hold one."""
    from safetensors.torch import load_file

    return load_file(checkpoint.path / REWARD_FILE)


def load_reward_model(checkpoint: Checkpoint) -> RewardModel | None:
    """The reward model of a checkpoint, fp32 on the CPU, in evaluation mode; None where the run trains none."""
    from trainer.reward import RewardModel

    if checkpoint.reward_config is None:
        return None
    model = RewardModel(checkpoint.reward_config)
    model.load_state_dict(load_reward_weights(checkpoint))
    return model.eval()
