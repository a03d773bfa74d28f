"""Pre-training of a reward model on all sessions of a log, good or not (paper §5.1.3: the judge is pre-trained).

The trainer that never stops trains its own beside the generator; this is for comparisons, where one judge must score
every method. A tenth of the sessions, chosen by their ids, is held out and says when to stop.
"""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch

from onerec.errors import UserError
from streaming.store import Reader
from trainer.batches import judged_batch
from trainer.config import RewardModelConfig
from trainer.data import Judged, judge_session
from trainer.items import Catalogue
from trainer.reward import RewardModel, RewardOptimizer

HELD_OUT = 0.1


class RewardTraining(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how fast; `epochs` is a bound, training stops once the held-out loss has not fallen for `patience`."""

    epochs: int = 4
    patience: int = 1
    batch_sessions: int = 64
    learning_rate: float = 4e-3
    seed: int = 0


class RewardFit(msgspec.Struct, frozen=True, kw_only=True):
    """What training came to: sums of the four towers' losses in nats, of a constant and of the model on held-out sessions."""

    sessions: int
    held_out: int
    epochs: int
    constant_loss: float
    loss: float
    seconds: float


def judged_sessions(reader: Reader, catalogue: Catalogue, config: RewardModelConfig) -> list[Judged]:
    """All sessions of a log with a known item, in its order."""
    settings = reader.semantics().session
    found = []
    for _, session in reader.sessions():
        judged = judge_session(
            session, catalogue.index, len(catalogue.index), m=config.session_items, n=config.history_length,
            swt_cap_ms=settings.swt_cap_ms, fresh=True,
        )
        if judged is not None:
            found.append(judged)
    return found


def fit_reward_model(
    sessions: Sequence[Judged],
    item_codes: np.ndarray,
    config: RewardModelConfig,
    training: RewardTraining,
    *,
    centroids: np.ndarray | None = None,
    progress: Callable[[int, float], None] = lambda epoch, loss: None,
) -> tuple[RewardModel, RewardFit]:
    """A reward model learnt from `sessions`, with the weights of its best epoch; `progress(epoch, held-out loss)`.

    centroids fp32 [L, K, c]: the codebook's, where it has any: what the items' content is at the start. Same sessions,
    settings and threads: same weights. Raises UserError for fewer than ten sessions.
    """
    held = [session for session in sessions if _is_held_out(session.session_id)]
    learnt = [session for session in sessions if not _is_held_out(session.session_id)]
    if len(sessions) < 10 or not held or not learnt:
        raise UserError(f"{len(sessions)} sessions are too few for a reward model; give a longer log")
    began = time.perf_counter()
    model = RewardModel(config)
    model.reset_parameters(torch.Generator().manual_seed(training.seed))
    if centroids is not None:
        model.start_from(centroids)
    optimizer = RewardOptimizer(model, learning_rate=training.learning_rate)
    model.start_at(torch.from_numpy(np.concatenate([session.labels for session in learnt])))
    constant = _loss(model, held, item_codes, training.batch_sessions)
    rng = np.random.default_rng([training.seed, 6])
    best, best_epoch, epoch, kept = constant, 0, 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, training.epochs + 1):
        model.train()
        for places in np.array_split(rng.permutation(len(learnt)), -(-len(learnt) // training.batch_sessions)):
            optimizer.step(judged_batch([learnt[place] for place in places], item_codes))
        loss = _loss(model, held, item_codes, training.batch_sessions)
        progress(epoch, loss)
        if loss < best:
            best, best_epoch, kept = loss, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= training.patience:
            break
    model.load_state_dict(kept)
    return model.eval(), RewardFit(
        sessions=len(sessions), held_out=len(held), epochs=epoch, constant_loss=constant, loss=best,
        seconds=time.perf_counter() - began,
    )


def _is_held_out(session_id: str) -> bool:
    return zlib.crc32(b"reward:" + session_id.encode()) < HELD_OUT * 2**32


@torch.no_grad()
def _loss(model: RewardModel, sessions: Sequence[Judged], item_codes: np.ndarray, size: int) -> float:
    """Mean over windows of the towers' summed loss (eq. 7)."""
    model.eval()
    total = windows = 0.0
    for begin in range(0, len(sessions), size):
        batch = judged_batch(sessions[begin : begin + size], item_codes)
        loss, stats = model.loss(batch)
        total += float(loss) * len(stats["labels"])
        windows += len(stats["labels"])
    return total / windows
