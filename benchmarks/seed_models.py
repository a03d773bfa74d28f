"""What the figures begin with: a simulated world, its reward model and a seed model that has learnt all but the last day.

All is kept in a folder named after the settings, so that figures of the same world share it: FOLDER/seed-S of each seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from onerec.config import Config
from simulator.world import World, WorldConfig
from streaming.semantics import HistoryConfig
from streaming.store import Reader
from trainer.batches import window_batch
from trainer.config import CatalogueConfig, ModelConfig, RewardModelConfig
from trainer.data import Example
from trainer.items import Catalogue
from trainer.judge import Case, OneRecRecommender, RewardFunction, modelled_rewards, true_rewards
from trainer.model import OneRec
from trainer.optim import Optimizer
from trainer.presets import preset
from trainer.reward import RewardModel
from trainer.reward_training import RewardTraining, fit_reward_model, judged_sessions
from trainer.table_data import open_catalogue, prepare_world, test_cases, train_state, training_examples

FIGURES = Path("docs/figures")
DOCUMENT = Path("docs/results-alignment.md")
Say = Callable[[str], None]
Floats = NDArray[np.float64]


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides worlds and seed models but the seed; `passes` of the seed model over its windows, in log order."""

    world: WorldConfig
    config: Config = Config(history=HistoryConfig(length=64), catalogue=CatalogueConfig(levels=3, codes=64))
    passes: int = 5
    learning_rate: float = 1e-3
    batch_windows: int = 64
    reward_epochs: int = 8
    cases: int = 300


FULL = Ground(world=WorldConfig(users=1_000, items=1_200, days=6))
QUICK = Ground(world=WorldConfig(users=300, items=400, days=4), passes=4, cases=120)
TRIAL = Ground(
    world=WorldConfig(users=60, items=150, days=3),
    config=Config(history=HistoryConfig(length=16), catalogue=CatalogueConfig(levels=3, codes=16)),
    passes=1, reward_epochs=1, cases=12,
)
"""For tests: shows that a figure is made, not what it shows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """One seed's beginning; `rewards` judge sessions: "true" is the world itself, "modelled" the reward model."""

    folder: Path
    seed: int
    ground: Ground
    world: World
    catalogue: Catalogue
    examples: list[Example]
    m: int
    cases: list[Case]
    reward_model: RewardModel
    rewards: Mapping[str, RewardFunction]
    say: Say


def begin(ground: Ground, seed: int, work: Path, say: Say) -> Start:
    """World, catalogue, windows, test cases and reward model of a seed; what the folder holds already is read from it."""
    folder = work / f"{zlib.crc32(msgspec.json.encode(ground)):08x}" / f"seed-{seed}"
    config = msgspec.structs.replace(
        ground.config, catalogue=msgspec.structs.replace(ground.config.catalogue, seed=seed)
    )
    world = msgspec.structs.replace(ground.world, seed=seed)
    data = prepare_world(folder, world, config, say=say)
    catalogue = open_catalogue(folder)
    with Reader(train_state(folder)) as reader:
        m = reader.semantics().session.target_items
        examples = list(training_examples(reader, catalogue, m=m))
        reward_model = _reward_model(folder, reader, catalogue, ground, seed, m, say)
    cases = test_cases(folder, data, catalogue, count=ground.cases, seed=seed)
    truth = World(world)
    modelled = modelled_rewards(
        reward_model, catalogue.item_codes, history_length=reward_model.config.history_length
    )
    say(f"seed {seed}: {len(examples):,} windows of {len({example.session_id for example in examples}):,} sessions, "
        f"{len(cases)} cases, {len(catalogue.item_ids):,} items")
    return Start(
        folder=folder, seed=seed, ground=ground, world=truth, catalogue=catalogue, examples=examples, m=m, cases=cases,
        reward_model=reward_model, rewards={"true": true_rewards(truth, catalogue.item_ids), "modelled": modelled}, say=say,
    )


def _reward_model(
    folder: Path, reader: Reader, catalogue: Catalogue, ground: Ground, seed: int, m: int, say: Say
) -> RewardModel:
    """Learnt from all sessions before the cut; once, then read from the folder."""
    config = RewardModelConfig(levels=catalogue.levels, codes=catalogue.codes, session_items=m)
    path = folder / "reward.safetensors"
    if path.exists():
        model = RewardModel(config)
        model.load_state_dict(load_file(path))
        return model.eval()
    model, fit = fit_reward_model(
        judged_sessions(reader, catalogue, config), catalogue.item_codes, config,
        RewardTraining(epochs=ground.reward_epochs, seed=seed), centroids=catalogue.centroids,
    )
    save_file(model.state_dict(), path)
    say(f"reward model: {fit.epochs} passes, held-out loss {fit.loss:.4f} (a constant: {fit.constant_loss:.4f})")
    return model


def architecture(start: Start, **changes: int) -> ModelConfig:
    """`tiny` for the catalogue of a seed, with `changes`."""
    given = preset(
        "tiny", levels=start.catalogue.levels, codes=start.catalogue.codes, session_items=start.m,
        history_length=start.ground.config.history.length,
    )
    return msgspec.structs.replace(given, **changes)


def new_model(config: ModelConfig, seed: int) -> OneRec:
    """A model with the first weights of a seed."""
    model = OneRec(config)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model


def seed_model(start: Start) -> OneRec:
    """The model that alignment begins with; learnt once, then read from the folder."""
    ground, path = start.ground, start.folder / "seed.safetensors"
    model = new_model(architecture(start), start.seed)
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        learn(
            model, start.examples, start.catalogue.item_codes, passes=ground.passes, learning_rate=ground.learning_rate,
            batch_windows=ground.batch_windows,
            after=lambda done, loss: start.say(f"seed model: pass {done} of {ground.passes}, loss {loss:.3f}"),
        )
        save_file(model.state_dict(), path)
    return model.eval()


def learn(
    model: OneRec,
    examples: Sequence[Example],
    item_codes: np.ndarray,
    *,
    passes: int,
    learning_rate: float,
    batch_windows: int = 64,
    after: Callable[[int, float], None] = lambda done, loss: None,
) -> None:
    """Next-token prediction over windows in their order; `after(passes done, mean loss of the pass in nats a code)`."""
    optimizer = Optimizer(model, learning_rate=learning_rate)
    for done in range(1, passes + 1):
        losses = [
            learn_batch(optimizer, examples[place : place + batch_windows], item_codes)
            for place in range(0, len(examples), batch_windows)
        ]
        after(done, float(np.mean(losses)))


def learn_batch(optimizer: Optimizer, examples: Sequence[Example], item_codes: np.ndarray) -> float:
    """One step; the loss before it, nats a code."""
    batch = window_batch(examples, item_codes, m=optimizer.model.config.session_items)
    return float(optimizer.step(lambda model: model.loss(batch))["ntp"])


def of_cases(cases: Sequence[Case]) -> list[Example]:
    """Test cases as windows."""
    return [Example(case.user_id, case.ts, case.history, case.targets, True, True) for case in cases]


def generated(
    recommender: OneRecRecommender, cases: Sequence[Case], rewards: Mapping[str, RewardFunction], width: int
) -> dict[str, Floats]:
    """Rewards of the `width` sessions generated for each case: [cases, 3 (mean, max, first), 4 targets] by judge."""
    found: dict[str, list[Floats]] = {name: [] for name in rewards}
    for case, sessions in zip(cases, recommender.sessions(cases, width), strict=True):
        for name, function in rewards.items():
            told = np.asarray(function(case, sessions), np.float64)
            found[name].append(np.stack([told.mean(axis=0), told.max(axis=0), told[0]]))
    return {name: np.stack(values) for name, values in found.items()}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that every figure has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small world: a minute, and figures that say little")
    parser.add_argument("--seeds", type=int, default=1, help="worlds, each with models of its own")
    parser.add_argument("--work", type=Path, help="folder that keeps worlds and models (default: a temporary one)")
    parser.add_argument("--out", type=Path, help=f"folder for plot and JSON (default: {FIGURES}, "
                        f"where the table in {DOCUMENT} is written anew as well)")
    return parser


def teller() -> Say:
    """Progress on stderr, with seconds since now."""
    began = time.monotonic()
    return lambda text: print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """The figures behind a plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))


def pyplot_agg() -> Any:
    """pyplot that draws to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
