"""A reinforcement stage as a run: from a run's newest checkpoint to a new run that `publish` and `train` take (ECPO)."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from exporter.trie import build_trie
from onerec.errors import Failure, UserError
from onerec.files import sha256_of
from onerec.versions import code_version
from streaming.store import Reader
from trainer.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    latest_checkpoint,
    load_model,
    load_optimizer,
    load_reward_model,
    save_checkpoint,
)
from trainer.data import Example, session_examples
from trainer.ecpo import EcpoConfig, Step, reinforce
from trainer.items import load_catalogue
from trainer.optim import Optimizer
from trainer.policy_rewards import IndustrialReward, ItemFunction, PolicyRewards
from trainer.runs import Run, locked, read_run, run_path, write_run

STEPS_FILE = "reinforce.jsonl"


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What a stage ended with; first and last are means over a tenth of its steps."""

    steps: int
    windows: int
    legal: tuple[float, float]
    reward: tuple[float | None, float | None]
    industrial: tuple[float | None, float | None]
    entropy: tuple[list[float], list[float]]
    equal_groups: int
    small_groups: int
    faults: int
    skipped: int
    checkpoint: str
    seconds: float


def reinforce_run(
    state_dir: Path,
    run_dir: Path,
    out_dir: Path,
    config: EcpoConfig,
    *,
    steps: int,
    seed: int = 0,
    industrial: tuple[str, ItemFunction] | None = None,
    industrial_weight: float = 1.0,
    threads: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[Step], None] = lambda step: None,
) -> tuple[Stage, list[Step]]:
    """Reinforce the newest checkpoint of `run_dir` on the sessions that it has learnt; the result is the run `out_dir`.

    Writes RUN2/reinforce.jsonl, a line a step, and one checkpoint at the end, or after the step during which `stopped()`
    became true. Optimiser, place in the log and reward model go along. `industrial`: name and function of a user's reward.
    Same arguments: same weights (CPU, same number of threads). Raises UserError for a run without a reward model, a state
    of another codebook, a folder that holds a run, or a log without a session to reinforce on.
    """
    began = time.perf_counter()
    run, checkpoint = _source(run_dir, out_dir)
    torch.set_num_threads(threads or run.config.threads)
    catalogue = load_catalogue(state_dir)
    if catalogue.version != checkpoint.codebook_version:
        raise UserError(
            f"{run_dir} has learnt the semantic IDs of codebook {checkpoint.codebook_version}, the state {state_dir} "
            f"now has {catalogue.version}: their codes mean other items; give the --state that the run began with"
        )
    reward_model = load_reward_model(checkpoint)
    if reward_model is None:
        raise UserError(
            f"{run_dir} has no reward model, and reinforcement has nothing to aim at; train one: "
            "onerec train --run NEW --set reward.train=true"
        )
    item_codes = catalogue.item_codes[: checkpoint.items]
    examples = _examples(state_dir, catalogue.index, checkpoint, run.backlog)
    user = None
    if industrial is not None:
        name, function = industrial
        ids = catalogue.item_ids[: checkpoint.items]
        user = IndustrialReward(function, ids, name=name, warn=say)
    trie = build_trie(item_codes, checkpoint.model_config.codes)
    rewards = PolicyRewards(trie, reward_model, run.reward, industrial=user, industrial_weight=industrial_weight)
    model = load_model(checkpoint)
    state = load_optimizer(checkpoint)
    optimizer = Optimizer(
        model, learning_rate=config.learning_rate, clip_norm=config.clip_norm, precision=config.precision
    )
    optimizer.load_state_dict(state["optimizer"])
    found: list[Step] = []
    with locked(out_dir):
        write_run(out_dir, msgspec.structs.replace(run, state=str(state_dir.resolve())))
        with _lines(out_dir / STEPS_FILE) as lines:
            for step in reinforce(
                model, examples, item_codes, rewards, config,
                generator=torch.Generator().manual_seed(seed), steps=steps, optimizer=optimizer,
            ):  # fmt: skip
                os.write(lines, msgspec.json.encode(step) + b"\n")
                found.append(step)
                progress(step)
                if stopped():
                    break
        written = save_checkpoint(
            out_dir,
            msgspec.structs.replace(
                checkpoint,
                step=checkpoint.step + len(found) * config.updates,
                metrics_bytes=0,
                rewards_bytes=0,
                score=None,
                pairs=0,
                version=1,
                created_ms=time.time_ns() // 1_000_000,
                code_version=code_version(),
                config_sha256=sha256_of(run_path(out_dir)),
            ),
            model.state_dict(),
            {**state, "optimizer": optimizer.state_dict()},
            reward_model.state_dict(),
        )
    return _stage(found, len(examples), written, time.perf_counter() - began), found


def _source(run_dir: Path, out_dir: Path) -> tuple[Run, Checkpoint]:
    """The run to go on from, and its newest checkpoint; refuses a folder for the result that holds a run."""
    run = read_run(run_dir)
    if run is None:
        raise UserError(f"{run_dir} is not a training run (no run.json); train first: onerec train --run {run_dir}")
    if checkpoint_steps(out_dir) or (out_dir / "metrics.jsonl").exists():
        raise UserError(f"--out {out_dir} holds a run already; give another folder")
    return run, latest_checkpoint(run_dir)


def _examples(state_dir: Path, index: dict[str, int], checkpoint: Checkpoint, backlog: int) -> list[Example]:
    """The windows of the high-quality sessions that the checkpoint has learnt."""
    last = max(checkpoint.cursor.sequence, backlog if checkpoint.cursor.round else 0)
    config, found = checkpoint.model_config, []
    with Reader(state_dir) as reader:
        for sequence, session in reader.sessions():
            if sequence > last:
                break
            if session.high_quality:
                found += session_examples(
                    session, index, checkpoint.items, m=config.session_items, n=config.history_length, fresh=False,
                    counts=Counter(),
                )  # fmt: skip
    return found


@contextmanager
def _lines(path: Path) -> Iterator[int]:
    """A file that is written anew, line by line."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}; mend permissions or disk") from error
    try:
        yield handle
    finally:
        os.close(handle)


def _stage(found: Sequence[Step], windows: int, written: Checkpoint, seconds: float) -> Stage:
    tenth = max(1, len(found) // 10)
    first, last = found[:tenth], found[-tenth:]

    def both(name: str) -> tuple[float | None, float | None]:
        return _mean(first, name), _mean(last, name)

    return Stage(
        steps=len(found),
        windows=windows,
        legal=(_mean(first, "legal") or 0.0, _mean(last, "legal") or 0.0),
        reward=both("reward"),
        industrial=both("industrial"),
        entropy=(_entropy(first), _entropy(last)),
        equal_groups=sum(step.equal_groups for step in found),
        small_groups=sum(step.small_groups for step in found),
        faults=sum(step.faults for step in found),
        skipped=sum(step.skipped for step in found),
        checkpoint=str(written.path),
        seconds=seconds,
    )


def _mean(steps: Sequence[Step], name: str) -> float | None:
    values = [value for step in steps if (value := getattr(step, name)) is not None]
    return sum(values) / len(values) if values else None


def _entropy(steps: Sequence[Step]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*(step.entropy for step in steps), strict=True)]


def draw_steps(runs: Mapping[str, Sequence[Step]], path: Path, *, title: str = "", smooth: int = 5) -> None:
    """Draw legality, reward, entropy of each level and gradient norm over the steps of `runs`, by name, to `path`.

    Each point is the mean of the `smooth` steps up to it; the gradient norm is drawn as it is.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    for number, (name, steps) in enumerate(runs.items()):
        colour, x = f"C{number}", [step.step for step in steps]
        axes[0, 0].plot(x, _smooth([step.legal for step in steps], smooth), color=colour, label=name)
        axes[0, 1].plot(x, _smooth([step.reward or float("nan") for step in steps], smooth), color=colour)
        for level, style in zip(range(len(steps[0].entropy)), ("-", "--", ":", "-."), strict=False):
            values = _smooth([step.entropy[level] for step in steps], smooth)
            axes[1, 0].plot(x, values, style, color=colour, label=f"level {level + 1}" if number == 0 else None)
        axes[1, 1].plot(x, [step.largest_gradient for step in steps], color=colour, linewidth=0.8)
    for axis, name in zip(
        axes.flat,
        ("legal sessions drawn without the trie, share", "reward R(u, S) of legal sessions, mean",
         "entropy of the policy, nats", "largest gradient norm of a step, before clipping"),
        strict=True,
    ):  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    axes[1, 1].set_yscale("log")
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(title)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise Failure(f"{path} could not be drawn: {error}; give a writable path that ends in .png or .svg") from error
    finally:
        pyplot.close(figure)


def _smooth(values: Sequence[float], width: int) -> list[float]:
    parts = [values[max(0, place + 1 - width) : place + 1] for place in range(len(values))]
    return [sum(part) / len(part) for part in parts]
