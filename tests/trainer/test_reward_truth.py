"""What the reward model learns from a simulated log, against the truth that the log was drawn from."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from onerec.config import Config
from simulator.log import write_world
from simulator.world import DAY_MS, World, WorldConfig
from streaming.replay import Replay
from streaming.semantics import Semantics
from streaming.store import Reader, Store
from trainer.config import RewardConfig, RewardModelConfig
from trainer.data import reward_arrays
from trainer.items import build_catalogue
from trainer.reward import TARGETS, RewardBatch, RewardModel, RewardOptimizer
from trainer.reward_metrics import tower_metrics
from trainer.reward_training import judged_sessions
from trainer.reward_weights import combine_array

WORLD = WorldConfig(users=400, items=300, days=5, seed=2)
CANDIDATES = 24


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The world, its catalogue, its sessions, and where the last day begins."""
    folder, world = tmp_path_factory.mktemp("world"), World(WORLD)
    write_world(world, folder / "w.jsonl", folder / "w.items.jsonl")
    with Store(folder / "state", Semantics()) as store:
        Replay(store, [str(folder / "w.items.jsonl"), str(folder / "w.jsonl")]).run()
    with Reader(folder / "state") as reader:
        catalogue = build_catalogue(folder / "state", reader, Config())
        config = RewardModelConfig(levels=catalogue.levels, codes=catalogue.codes)
        return world, catalogue, config, judged_sessions(reader, catalogue, config), WORLD.start_ms + 4 * DAY_MS


@pytest.fixture(scope="module")
def learnt(log):
    """A model after one pass over the days before the last, and what it predicted of each window before it learnt it."""
    _, catalogue, config, judged, cut = log
    model = RewardModel(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    model.start_from(catalogue.centroids)
    optimizer = RewardOptimizer(model, 4e-3)
    sessions = [session for session in judged if session.ts < cut]
    stats = [
        optimizer.step(RewardBatch(*map(torch.from_numpy, reward_arrays(sessions[at : at + 32], catalogue.item_codes))))
        for at in range(0, len(sessions), 32)
    ]
    return model.eval(), *(np.concatenate([one[name].numpy() for one in stats]) for name in ("predictions", "labels"))


@pytest.mark.slow
def test_it_ranks_sessions_of_a_user_as_the_truth_does_and_better_than_popularity(log, learnt):
    world, catalogue, _, judged, cut = log
    rng, codes = np.random.default_rng(0), catalogue.item_codes
    rows = np.array([world.item_index(item) for item in catalogue.item_ids])
    watched = np.concatenate([one.windows[one.windows >= 0] for one in judged if one.ts < cut])
    popularity = np.bincount(watched, minlength=len(rows))
    cases = [session for session in judged if session.ts >= cut and len(session.history) >= 5][:80]
    found = {"model": [], "popularity": []}
    for case in cases:
        sessions = np.stack([rng.choice(len(rows), 5, replace=False) for _ in range(CANDIDATES)])
        user = np.full(CANDIDATES, world.user_index(case.session_id.split(":")[0]))
        truth = combine_array(np.stack(world.true_rewards(user, rows[sessions], 4), axis=-1), RewardConfig())
        history = torch.from_numpy(codes[case.history].astype(np.int64))[None]
        items = torch.from_numpy(codes[sessions].astype(np.int64))[None]
        with torch.no_grad():
            rewards = learnt[0].rewards(
                history, torch.ones(history.shape[:2], dtype=torch.bool), items, torch.ones(items.shape[:3], dtype=torch.bool)
            )
        found["model"].append(spearmanr(combine_array(rewards[0].numpy(), RewardConfig()), truth)[0])
        found["popularity"].append(spearmanr(popularity[sessions].sum(1), truth)[0])
    means = {name: float(np.mean(values)) for name, values in found.items()}
    assert means["model"] > 0.45
    assert means["model"] > means["popularity"] + 0.15


@pytest.mark.slow
def test_predictions_before_learning_are_better_than_chance_and_calibrated(learnt):
    _, predictions, labels = learnt
    half = len(labels) // 2
    for place, target in enumerate(TARGETS):
        metrics = tower_metrics(predictions[half:, place], labels[half:, place])
        assert metrics.ece < 0.05 and abs(metrics.mean_prediction - metrics.base_rate) < 0.03, target
        if target != "wtr":  # 68 follows in 3,417 windows say what the rate is, and little of the order
            assert metrics.auc > 0.52 and metrics.correlation > 0.1 and metrics.lift > 1.1, target
