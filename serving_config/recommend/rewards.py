"""A bundle's reward model: what each session is worth to a user, and which session is worth most (paper eq. 5-7)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from serving_config.recommend.graphs import Place, open_graph, pad
from trainer.config import RewardConfig, RewardModelConfig
from trainer.reward_weights import combine_array


class RewardGraph:
    """The reward model's ONNX graph on one device.

    Args:
        folder: where the graph files and their weights are.
        config: its architecture.
        threads: ONNX Runtime's threads within an operator.
        device: CUDA device id, None = CPU; the CPU too where CUDA cannot be used, with a line on standard error.
    """

    def __init__(
        self, folder: Path, config: RewardModelConfig, *, threads: int = 2, device: int | None = None
    ) -> None:
        self._config = config
        self._session, self._place = open_graph(folder, threads=threads, device=device)

    def rewards(
        self, histories: Sequence[NDArray[np.int64]], sessions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """swt, vtr, wtr, ltr fp32 [B, W, 4] of full sessions' codes int64 [B, W, m, L]; histories each int64 [T, L].

        Of a history the newest `history_length` items are read.
        """
        newest = [history[-self._config.history_length :] for history in histories]
        codes, mask = pad(newest, self._config.levels)
        inputs = {
            "history": codes,
            "history_mask": mask,
            "sessions": sessions,
            "session_mask": np.ones(sessions.shape[:3], dtype=bool),
        }
        place: Place = self._place
        values = {name: ort.OrtValue.ortvalue_from_numpy(array, *place) for name, array in inputs.items()}
        [rewards] = self._session.run_with_ort_values(["rewards"], values)
        return rewards.numpy()


def best_by_reward(rewards: NDArray[np.float32], weights: RewardConfig, count: int) -> NDArray[np.int64]:
    """Places of the `count` sessions of the highest combined reward, best first; of equals the one that stands first.

    Raises ValueError where a reward is not a number: no order would mean anything.
    """
    combined = combine_array(rewards, weights)
    if not np.isfinite(combined).all():
        raise ValueError("the reward model gives what is not a number")
    return np.argsort(-combined, kind="stable")[:count]
