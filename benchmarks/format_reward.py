"""Reinforcement with and without the format reward, and ECPO's clipping against GRPO's, on a small simulated world.

    python benchmarks/format_reward.py [--steps 60] [--seed 0] [--threads 2] [--work DIR] [--plot FILE] [--json FILE]

A small generator learns the first days by next-token prediction, a reward model judges; then each variant goes on from
the same weights for the same steps, and is measured on users of the last day, whom nobody has seen: legality of what it
writes without the trie, and modelled and true reward of sessions drawn with it. Prints a Markdown table. About four
minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from exporter.trie import Trie, build_trie
from onerec.config import Config
from simulator.world import World, WorldConfig
from streaming.store import Reader
from trainer.batches import window_batch
from trainer.beam import trie_tensors
from trainer.config import ModelConfig, RewardConfig, RewardModelConfig
from trainer.data import Example, to_arrays
from trainer.ecpo import EcpoConfig, Step, reinforce
from trainer.items import Catalogue
from trainer.judge import Case, true_rewards
from trainer.model import OneRec
from trainer.optim import Optimizer
from trainer.policy_rewards import PolicyRewards, legality
from trainer.reinforcement import draw_steps
from trainer.reward_training import RewardTraining, fit_reward_model, judged_sessions
from trainer.rollout import sample_sessions
from trainer.table_data import open_catalogue, prepare_world, test_cases, train_state, training_examples

M = 5
HISTORY = 24
MODEL = ModelConfig(d_model=64, heads=4, encoder_layers=1, decoder_layers=1, d_ff=128, experts=2, history_length=HISTORY)
LEARN_STEPS, LEARN_WINDOWS, LEARN_RATE = 400, 32, 3e-3
BASE = EcpoConfig(users=8, group=12, format_sessions=12, source="free", renew=8, learning_rate=5e-4)
VARIANTS: dict[str, dict[str, Any]] = {
    "ECPO, format reward": {},
    "ECPO, no format reward": {"format_weight": 0.0},
    "GRPO's clipping, no format reward": {"format_weight": 0.0, "delta": None},
    "ECPO, format reward, no NTP": {"ntp_weight": 0.0},
    "ECPO, no format reward, no NTP": {"ntp_weight": 0.0, "format_weight": 0.0},
    "GRPO's clipping, neither": {"ntp_weight": 0.0, "format_weight": 0.0, "delta": None},
}
CASES, DRAWN = 48, 24


def learn(examples: list[Example], catalogue: Catalogue, seed: int) -> Optimizer:
    """The generator after next-token prediction, with its optimiser."""
    model = OneRec(msgspec.structs.replace(MODEL, levels=catalogue.levels, codes=catalogue.codes, session_items=M))
    model.reset_parameters(torch.Generator().manual_seed(seed))
    optimizer, rng = Optimizer(model, learning_rate=LEARN_RATE, precision="fp32"), np.random.default_rng(seed)
    for _ in range(LEARN_STEPS):
        chosen = [examples[place] for place in rng.integers(0, len(examples), LEARN_WINDOWS)]
        batch = window_batch(chosen, catalogue.item_codes, m=M)
        optimizer.step(partial(OneRec.loss, batch=batch))
    model.eval()
    return optimizer


def measure(
    model: OneRec, cases: list[Case], catalogue: Catalogue, trie: Trie, rewards: PolicyRewards, world: World
) -> dict[str, float]:
    """Legality without the trie, and rewards of sessions with it, over unseen users."""
    generator = torch.Generator().manual_seed(0)
    examples = [Example(case.user_id, case.ts, case.history[-HISTORY:], case.targets, True, True) for case in cases]
    history, mask = (torch.from_numpy(array) for array in to_arrays(examples, catalogue.item_codes, m=M)[:2])
    free = sample_sessions(model, history, mask, count=DRAWN, generator=generator)
    found = legality(trie, free.codes.numpy())
    drawn = sample_sessions(model, history, mask, count=DRAWN, generator=generator, trie=trie_tensors(trie))
    earned = rewards(history, mask, drawn.codes)
    rows = trie.session_rows(earned.legality.leaves)
    truth = true_rewards(world, catalogue.item_ids)
    true = np.stack([truth(case, sessions) for case, sessions in zip(cases, rows, strict=True)])
    return {
        "legal": float(found.sessions.mean()),
        "legal items": float(found.items.mean()),
        "reward": float(earned.rewards.mean()),
        "true reward": float(true.mean()),
        "items shown": float(len(np.unique(rows)) / len(catalogue.item_codes)),
    }


def main() -> None:
    """Run all variants, print the table, draw the curves."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--work", type=Path)
    options.add_argument("--plot", type=Path)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        run(given, Path(given.work or scratch))


def run(given: argparse.Namespace, work: Path) -> None:
    """The benchmark in a folder for its data."""
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:5.0f} s {time.process_time():5.0f} s of CPU: {text}", file=sys.stderr, flush=True)

    shape = WorldConfig(users=250, items=300, days=3, seed=given.seed)
    data = prepare_world(work / f"world-{given.seed}", shape, Config())
    folder, world = work / f"world-{given.seed}", World(shape)
    catalogue = open_catalogue(folder)
    with Reader(train_state(folder)) as reader:
        found = training_examples(reader, catalogue, m=M)
        examples = [example._replace(history=example.history[-HISTORY:]) for example in found]
        config = RewardModelConfig(
            levels=catalogue.levels, codes=catalogue.codes, session_items=M, dimension=32, hidden=32, history_length=HISTORY
        )
        sessions = judged_sessions(reader, catalogue, config)
    say(f"{len(examples):,} windows, {len(sessions):,} sessions")
    reward_model, fit = fit_reward_model(
        sessions, catalogue.item_codes, config, RewardTraining(seed=given.seed, epochs=4), centroids=catalogue.centroids
    )
    say(f"reward model: loss {fit.loss:.3f}, of a constant {fit.constant_loss:.3f}")
    cases = test_cases(folder, data, catalogue, count=CASES, seed=given.seed)
    learnt = learn(examples, catalogue, given.seed)
    trie = build_trie(catalogue.item_codes, catalogue.codes)
    rewards = PolicyRewards(trie, reward_model, RewardConfig())
    say(f"the generator has learnt {LEARN_STEPS} steps")
    curves: dict[str, list[Step]] = {}
    table = {"before": {**measure(learnt.model, cases, catalogue, trie, rewards, world), "gradient": float("nan")}}
    for name, changes in VARIANTS.items():
        model, settings = copy.deepcopy(learnt.model), msgspec.structs.replace(BASE, **changes)
        optimizer = Optimizer(model, learning_rate=settings.learning_rate, precision="fp32")
        optimizer.load_state_dict(learnt.state_dict())
        curves[name] = list(
            reinforce(
                model, examples, catalogue.item_codes, rewards, settings,
                generator=torch.Generator().manual_seed(given.seed), steps=given.steps, optimizer=optimizer,
            )
        )
        norms = [step.largest_gradient for step in curves[name]]
        table[name] = {
            **measure(model, cases, catalogue, trie, rewards, world),
            "gradient": float(np.median(norms)),
            "largest gradient": max(norms),
            "largest ratio": max(step.ratio for step in curves[name]),
            "seconds": sum(step.seconds for step in curves[name]),
        }
        say(f"{name}: {json.dumps(table[name])}")
    names = list(next(reversed(table.values())))
    print(f"\n| variant | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for name, values in table.items():
        print(f"| {name} | " + " | ".join(f"{values[key]:.4g}" if values.get(key) == values.get(key) and key in values
                                           else "–" for key in names) + " |")
    say("done")
    if given.json:
        given.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        draw_steps(curves, given.plot, title=f"{given.steps} steps, {BASE.updates} updates each, groups drawn without the trie")


if __name__ == "__main__":
    main()
