"""How well the reward model ranks sessions, where the truth is known, and what a step of it costs.

    python -m benchmarks.reward [--users 1000] [--items 2000] [--days 7]
        [--plot docs/reward.png] [--write docs/reward.md] [--json]

A simulated world is replayed into a state, and all sessions before the last day are learnt in their order, each batch of
64 predicted before it is learnt. Then, for users of the last day with their histories: 32 sessions each of random items,
as other users watched them, of the user's own items mixed with others', and of items that share the first code with
something in the history, as beam search writes them. Figures are means over users of the rank correlation between the
combined reward and the true one among a user's 32, and the true gain of choosing the best of them, 1 = the truly best.

Rows beside the model: without the items' own labels, without the codebook's centroids; popularity of the items, the
mean label of the windows in which an item was; and the world's own formulas with the mean of the history's true vectors
as taste: what exact knowledge of every item would give.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

from benchmarks.markers import put_between
from onerec.config import Config
from simulator.log import write_world
from simulator.world import DAY_MS, World, WorldConfig
from streaming.replay import Replay
from streaming.semantics import Semantics
from streaming.sessions import Session
from streaming.store import Reader, Store
from trainer.config import RewardConfig, RewardModelConfig
from trainer.data import Judged, judge_session, reward_arrays, session_examples, to_arrays
from trainer.items import Catalogue, build_catalogue
from trainer.model import Batch, OneRec
from trainer.optim import Optimizer
from trainer.presets import preset
from trainer.reward import RewardBatch, RewardModel, RewardOptimizer
from trainer.reward_log import PREDICTION
from trainer.reward_metrics import TowerMetrics, draw, towers
from trainer.reward_weights import TARGETS, combine_array

BATCH = 64
FIELDS = ("base_rate", "mean_prediction", "auc", "correlation", "ece", "lift")
CANDIDATES = 32
USERS = 100
SETS = ("random", "others", "recombined", "near")
Rows = np.ndarray


class Data(NamedTuple):
    """A replayed world: its sessions in the log's order, and where the last day begins."""

    world: World
    catalogue: Catalogue
    judged: list[Judged]
    cut: int
    known: np.ndarray  # row in the world of each catalogue row


def judged_of(session: Session, catalogue: Catalogue) -> Judged | None:
    """A session as the trainer's reward model reads it."""
    return judge_session(session, catalogue.index, len(catalogue.index), m=5, n=64, swt_cap_ms=300_000, fresh=True)


def make_data(config: WorldConfig, folder: Path) -> Data:
    """Simulate, replay, give codes, read the sessions."""
    world = World(config)
    write_world(world, folder / "w.jsonl", folder / "w.items.jsonl")
    with Store(folder / "state", Semantics()) as store:
        Replay(store, [str(folder / "w.items.jsonl"), str(folder / "w.jsonl")]).run()
    with Reader(folder / "state") as reader:
        catalogue = build_catalogue(folder / "state", reader, Config())
        judged = [
            found
            for _, session in reader.sessions()
            if (found := judged_of(session, catalogue)) is not None
        ]
    known = np.array([world.item_index(item) for item in catalogue.item_ids])
    return Data(world, catalogue, judged, config.start_ms + (config.days - 1) * DAY_MS, known)


class Trial(NamedTuple):
    """Users of the last day, their candidate sessions by set, and what those are truly worth."""

    cases: list[Judged]
    candidates: dict[str, Rows]  # int64 [U, 32, m]
    truth: dict[str, np.ndarray]  # [U, 32, 4]


def make_trial(data: Data, seed: int) -> Trial:
    """The first session of each of some users on the last day, and sessions that they might have been shown."""
    rng = np.random.default_rng(seed)
    last = [session for session in data.judged if session.ts >= data.cut]
    first = {session.session_id.split(":")[0]: session for session in reversed(last)}
    users = [sorted(first)[place] for place in rng.permutation(len(first))[:USERS]]
    cases = [first[user] for user in users]
    full = np.concatenate([session.windows[(session.windows >= 0).all(1)] for session in last])
    seen = np.concatenate([session.windows[session.windows >= 0] for session in last])
    everything, group = np.arange(len(data.known)), data.catalogue.item_codes[:, 0]

    def drawn(pool: np.ndarray) -> Rows:
        return np.stack([rng.choice(pool, 5, replace=False) for _ in range(CANDIDATES)])

    sets: dict[str, list[Rows]] = {name: [] for name in SETS}
    for case in cases:
        own = case.windows[case.windows >= 0]
        near = np.flatnonzero(np.isin(group, group[case.history]))
        sets["random"].append(drawn(everything))
        sets["others"].append(full[rng.integers(0, len(full), CANDIDATES)])
        sets["recombined"].append(drawn(np.unique(np.concatenate([own, rng.choice(seen, 2 * len(own) + 20)]))))
        sets["near"].append(drawn(near if len(near) >= 5 else everything))
    candidates = {name: np.stack(rows) for name, rows in sets.items()}
    rows = np.array([data.world.user_index(user) for user in users])
    truth = {}
    for name, items in candidates.items():
        flat = data.known[items.reshape(-1, 5)]
        found = data.world.true_rewards(np.repeat(rows, CANDIDATES), flat, data.world.config.days - 1)
        truth[name] = np.stack(found, axis=-1).reshape(*items.shape[:2], 4)
    return Trial(cases, candidates, truth)


def within(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean over users of Spearman's correlation among a user's candidates, both [U, n]."""
    first, second = (rankdata(values, axis=1) for values in (scores, truth))
    first, second = (ranks - ranks.mean(1, keepdims=True) for ranks in (first, second))
    spread = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    return float(np.mean((first * second).sum(1)[spread > 0] / spread[spread > 0]))


def gain(scores: np.ndarray, truth: np.ndarray) -> float:
    """What the candidate of the best score has above a user's mean, as a share of what the truly best has."""
    best = truth[np.arange(len(truth)), scores.argmax(1)]
    return float((best - truth.mean(1)).mean() / (truth.max(1) - truth.mean(1)).mean())


def judge(score: Callable[[str], np.ndarray], trial: Trial) -> dict[str, Any]:
    """Figures of `score(set)` [U, 32, 4], or [U, 32] for what knows no towers."""
    found: dict[str, Any] = {}
    for name in SETS:
        scores, truth = score(name), trial.truth[name]
        whole = combine_array(truth, RewardConfig())
        combined = combine_array(scores, RewardConfig()) if scores.ndim == 3 else scores
        found[name] = {"correlation": within(combined, whole), "gain": gain(combined, whole)}
        if scores.ndim == 3:
            found[name]["towers"] = {t: within(scores[..., i], truth[..., i]) for i, t in enumerate(TARGETS)}
    return found


@torch.no_grad()
def rewards_of(model: RewardModel, data: Data, trial: Trial, name: str) -> np.ndarray:
    """The model's rewards [U, 32, 4] of a set."""
    codes, found = data.catalogue.item_codes, []
    for begin in range(0, len(trial.cases), 50):
        # One window each: a longer session would be several rows.
        cases = [
            case._replace(windows=case.windows[:1], labels=case.labels[:1], item_labels=case.item_labels[:1])
            for case in trial.cases[begin : begin + 50]
        ]
        arrays = reward_arrays(cases, codes)
        sessions = torch.from_numpy(codes[trial.candidates[name][begin : begin + 50]].astype(np.int64))
        mask = torch.ones(sessions.shape[:3], dtype=torch.bool)
        history = (torch.from_numpy(arrays.history), torch.from_numpy(arrays.history_mask))
        found.append(model.eval().rewards(*history, sessions, mask).numpy())
    return np.concatenate(found)


class Learnt(NamedTuple):
    """Figures on the last day before any of it was learnt, and the predictions of all windows."""

    figures: dict[str, Any]
    rows: np.ndarray
    loss: float


def learn(data: Data, trial: Trial, *, learning_rate: float, epochs: int, seed: int, item_labels: bool = True,
          centroids: bool = True) -> Learnt:
    """Learn all sessions before the last day `epochs` times in their order, judge, then go through the last day."""
    model = RewardModel(RewardModelConfig(codes=data.catalogue.codes, levels=data.catalogue.levels))
    model.reset_parameters(torch.Generator().manual_seed(seed))
    if centroids and data.catalogue.centroids is not None:
        model.start_from(data.catalogue.centroids)
    optimizer = RewardOptimizer(model, learning_rate)
    rows = []
    before = [session for session in data.judged if session.ts < data.cut]
    after = [session for session in data.judged if session.ts >= data.cut]
    figures: dict[str, Any] = {}
    for epoch in range(epochs + 1):
        if epoch == epochs:
            figures = judge(lambda name: rewards_of(model, data, trial, name), trial)
        sessions = before if epoch < epochs else after
        for begin in range(0, len(sessions), BATCH):
            part = sessions[begin : begin + BATCH]
            batch = RewardBatch(*map(torch.from_numpy, reward_arrays(part, data.catalogue.item_codes)))
            stats = optimizer.step(batch if item_labels else batch._replace(item_labels=None))
            if epoch in (0, epochs):
                found = np.zeros(len(stats["labels"]), PREDICTION)
                found["ts"] = np.concatenate([np.full(len(session.windows), session.ts) for session in part])
                found["prediction"], found["label"] = stats["predictions"].numpy(), stats["labels"].numpy()
                rows.append(found)
    every = np.concatenate(rows)
    last = every[every["ts"] >= data.cut]
    p, y = last["prediction"].astype(float), last["label"].astype(float)
    return Learnt(figures, every, float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(1).mean()))


def baselines(data: Data, trial: Trial) -> dict[str, dict[str, Any]]:
    """What needs no model, and what needs the world's secrets."""
    windows = [
        (window[window >= 0], label)
        for session in data.judged if session.ts < data.cut
        for window, label in zip(session.windows, session.labels.mean(1), strict=True)
    ]
    items = np.concatenate([window for window, _ in windows])
    counts = np.bincount(items, minlength=len(data.known)).astype(float)
    labels = np.concatenate([np.full(len(window), label) for window, label in windows])
    prior = labels.mean()
    means = (np.bincount(items, labels, len(data.known)) + 5 * prior) / (counts + 5)
    world = data.world

    def taste_of_history(name: str) -> np.ndarray:
        places, found = np.arange(5.0), []
        for case, sessions in zip(trial.cases, data.known[trial.candidates[name]], strict=True):
            vectors = world.item_vectors[data.known[case.history]]
            taste = vectors.mean(0) if len(vectors) else np.zeros(world.item_vectors.shape[1])
            tastes = np.broadcast_to(taste / max(float(np.linalg.norm(taste)), 1e-9), (CANDIDATES, 1, len(taste)))
            said = world.responses(tastes, sessions, world.fatigue(world.topic[sessions]), places)
            swt = np.minimum(np.exp(said.log_watch).sum(1) / 300_000, 1)
            interactions = [1 - np.prod(1 - said.effective * chance, axis=1) for chance in (said.follow, said.like)]
            found.append(np.stack([swt, said.effective.mean(1), *interactions], axis=-1))
        return np.stack(found)

    return {
        "popularity": judge(lambda name: counts[trial.candidates[name]].sum(-1), trial),
        "mean label of the item": judge(lambda name: means[trial.candidates[name]].sum(-1), trial),
        "world's formulas, taste from history": judge(taste_of_history, trial),
    }


def speed(state: Path, data: Data, steps: int = 12) -> dict[str, float]:
    """Median milliseconds of a generator's step (tiny) and of the reward model's on the sessions between."""
    config = preset("tiny", levels=data.catalogue.levels, codes=data.catalogue.codes)
    generator = Optimizer(OneRec(config), precision="auto")
    reward = RewardOptimizer(RewardModel(RewardModelConfig(codes=data.catalogue.codes)))
    codes, index = data.catalogue.item_codes, data.catalogue.index
    times: dict[str, list[float]] = {"generator": [], "reward": []}
    with Reader(state) as reader:
        examples, judged = [], []
        for _, session in reader.sessions(after=len(data.judged) // 2):
            judged.append(judged_of(session, data.catalogue))
            if session.high_quality:
                examples += session_examples(session, index, len(index), m=5, n=256, fresh=True, counts=Counter())
            if len(examples) < BATCH:
                continue
            batch = Batch(*map(torch.from_numpy, to_arrays(examples, codes, m=5)))
            began = time.perf_counter()
            generator.step(lambda model, batch=batch: model.loss(batch))
            times["generator"].append(time.perf_counter() - began)
            known = [found for found in judged if found is not None]
            began = time.perf_counter()
            reward.step(RewardBatch(*map(torch.from_numpy, reward_arrays(known, codes))))
            times["reward"].append(time.perf_counter() - began)
            examples, judged = [], []
            if len(times["reward"]) == steps:
                break
    found = {f"{name}_ms": 1000 * statistics.median(taken) for name, taken in times.items()}
    return {**found, "share": found["reward_ms"] / found["generator_ms"]}


def tables(
    found: dict[str, Any], metrics: dict[str, TowerMetrics], cost: dict[str, float]
) -> list[tuple[list[str], list[list[str]]]]:
    """What is shown: heads and rows of the rankings, of each tower, and of the cost of a step."""
    ranking = [
        [row, *(f"{of[name]['correlation']:.3f} · {of[name]['gain']:.2f}" for name in SETS), _figure(of.get("loss"))]
        for row, of in found.items()
    ]
    of_model = found["reward model"]
    each = [
        [tower, *(f"{of_model[name]['towers'][tower]:.3f}" for name in SETS)]
        + [_figure(getattr(metrics[tower], field)) for field in FIELDS]
        for tower in TARGETS
    ]
    step = [[f"{cost['generator_ms']:.1f}", f"{cost['reward_ms']:.1f}", f"{cost['share']:.0%}"]]
    return [
        (["correlation · gain of the best of 32", *SETS, "loss, last day"], ranking),
        (["tower", *SETS, *(field.replace("_", " ") for field in FIELDS)], each),
        (["a step of the generator (tiny), ms", "of the reward model, ms", "share"], step),
    ]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main() -> None:
    """Make the world, learn, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=RewardConfig().learning_rate)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="store_true", help="the model alone, without the rows beside it")
    parser.add_argument("--plot", type=Path, help="reliability plots and AUC by event time of the model")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this document")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = WorldConfig(users=options.users, items=options.items, days=options.days, seed=options.seed)
        data = make_data(config, Path(folder))
        trial = make_trial(data, options.seed)
        settings = {"learning_rate": options.learning_rate, "epochs": options.epochs, "seed": options.seed}
        learnt = learn(data, trial, **settings)
        found: dict[str, Any] = {"reward model": {**learnt.figures, "loss": learnt.loss}}
        if not options.only:
            for name, left_out in (("without items' own labels", {"item_labels": False}),
                                   ("without centroids", {"centroids": False})):
                other = learn(data, trial, **settings, **left_out)
                found[name] = {**other.figures, "loss": other.loss}
            found.update(baselines(data, trial))
        cost = speed(Path(folder) / "state", data)
    if options.plot is not None:
        draw(learnt.rows, options.plot)
    metrics = towers(learnt.rows)
    if options.write is not None:
        text = "\n\n".join(markdown(*table) for table in tables(found, metrics, cost))
        put_between(options.write, "benchmarks/reward.py", text)
    if options.json:
        predictions = {name: msgspec.to_builtins(one) for name, one in metrics.items()}
        print(json.dumps({"ranking": found, "predictions": predictions, "step": cost, "windows": len(learnt.rows)}))
        return
    console = Console(width=128)
    for head, rows in tables(found, metrics, cost):
        table = Table()
        for place, name in enumerate(head):
            table.add_column(name, justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
