"""RUN/run.json: what a run was begun with, so that it goes on with the same and refuses anything else."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from onerec.config import Config
from onerec.errors import Failure, UserError
from onerec.files import sync_path
from trainer.config import ModelConfig, PreferenceConfig, RewardConfig, RewardModelConfig, TrainConfig

FORMAT = 2
OPERATIONAL = frozenset(
    {
        *(f"train.{name}" for name in ("checkpoint_sessions", "checkpoint_seconds", "keep_checkpoints", "idle_seconds")),
        *(f"train.{name}" for name in ("micro_windows", "shard_optimizer")),
        *(f"reward.{name}" for name in ("swt", "vtr", "wtr", "ltr")),
        *(f"preference.{name}" for name in ("ratio", "responses", "min_margin", "max_age", "pairs_per_step", "seed_sessions")),
    }
)
"""Settings that may change between two starts of a run: given log, journal and pairs, they decide no weight beyond the
rounding of sums."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the weights of a run beside the log; `backlog`: the last sequence learnt in several passes."""

    state: str
    codebook_version: str
    model: ModelConfig
    config: TrainConfig
    precision: str
    reward: RewardConfig
    reward_model: RewardModelConfig | None
    preference: PreferenceConfig
    backlog: int = 0
    format: int = FORMAT


def run_path(run_dir: Path) -> Path:
    """RUN/run.json."""
    return run_dir / "run.json"


def read_run(run_dir: Path) -> Run | None:
    """The run in a folder; None where none was begun. Raises UserError for a file that is damaged or foreign."""
    path = run_path(run_dir)
    if not path.exists():
        return None
    try:
        run = msgspec.json.decode(path.read_bytes(), type=Run)
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror}; mend its permissions") from error
    except msgspec.DecodeError as error:
        raise UserError(f"{path} is not the description of a run ({error}); give another --run") from None
    if run.format != FORMAT:
        raise UserError(f"{path} has format {run.format}, this version reads {FORMAT}; give another --run")
    return run


def write_run(run_dir: Path, run: Run) -> None:
    """Write run.json whole or not at all."""
    path = run_path(run_dir)
    staging = path.with_suffix(".writing")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        staging.write_bytes(msgspec.json.format(msgspec.json.encode(run)) + b"\n")
        sync_path(staging)
        staging.rename(path)
        sync_path(run_dir)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}; mend permissions or free space") from error


def settled(run: Run, run_dir: Path, state_dir: Path, asked: Config, explicit: Collection[str]) -> Run:
    """The run to go on with: as it was begun, with the operational settings that are asked for now.

    A state that was moved is followed. `explicit`: dotted names that the user gave himself. Raises UserError where another
    state, or explicitly another value of a deciding setting, is asked for.
    """
    if Path(run.state) != state_dir.resolve():
        if Path(run.state).exists():
            raise UserError(f"{run_dir} was begun on the state {run.state}, not {state_dir}; give another --run")
        run = msgspec.structs.replace(run, state=str(state_dir.resolve()))
        write_run(run_dir, run)
    begun = {"train": run.config, "reward": run.reward, "preference": run.preference}
    for name in sorted(set(explicit) - OPERATIONAL):
        section, _, key = name.partition(".")
        if section not in begun:
            continue
        before, now = getattr(begun[section], key), getattr(getattr(asked, section), key)
        if before != now:
            raise UserError(f"{run_dir} was begun with {name}={before}, not {now}; leave it out, or give another --run")
    now_asked: dict[str, dict[str, object]] = {section: {} for section in begun}
    for name in OPERATIONAL:
        section, _, key = name.partition(".")
        now_asked[section][key] = getattr(getattr(asked, section), key)
    return msgspec.structs.replace(
        run,
        config=msgspec.structs.replace(run.config, **now_asked["train"]),
        reward=msgspec.structs.replace(run.reward, **now_asked["reward"]),
        preference=msgspec.structs.replace(run.preference, **now_asked["preference"]),
    )


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run: one trainer a folder. Raises UserError where another holds it; a killed one holds nothing."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Failure(f"{run_dir} cannot be written: {error.strerror}; mend permissions, or give another") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another trainer is at work in {run_dir}; stop it, or give another --run") from None
        yield
    finally:
        os.close(handle)
