"""The reward model in the stream: it predicts each window of every session, good or not, and then learns it (eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.batches import judged_batch
from trainer.checkpoint import Checkpoint, load_reward_weights
from trainer.data import Judged
from trainer.evaluate import finite
from trainer.items import Catalogue
from trainer.reward import RewardModel, RewardOptimizer
from trainer.reward_log import PREDICTION
from trainer.run_files import RunFile
from trainer.runs import Run


class Judging:
    """A run's reward model with its optimiser; predictions go to `file` (RUN/rewards.bin).

    Without a reward model in the run all of it does nothing. A new model starts from the catalogue's centroids.
    """

    def __init__(
        self, run: Run, catalogue: Catalogue, checkpoint: Checkpoint | None, file: RunFile, device: str
    ) -> None:
        self._file, self._device = file, device
        self._model = RewardModel(run.reward_model).to(device) if run.reward_model else None
        self._optimizer: RewardOptimizer | None = None
        if self._model is None:
            return
        if checkpoint is not None:
            self._model.load_state_dict(load_reward_weights(checkpoint))
        elif catalogue.centroids is not None:
            self._model.start_from(catalogue.centroids)
        self._optimizer = RewardOptimizer(self._model, run.reward.learning_rate)

    def learn(self, step: int, judged: Sequence[Judged], item_codes: np.ndarray) -> tuple[float | None, int]:
        """Predict, then learn, the sessions of a batch: the mean loss before (None: nothing learnt), windows predicted."""
        if self._optimizer is None or not judged:
            return None, 0
        stats = self._optimizer.step(judged_batch(judged, item_codes, self._device))
        times = np.concatenate([np.full(len(session.windows), session.ts if session.fresh else -1) for session in judged])
        fresh = times >= 0
        rows = np.zeros(int(fresh.sum()), PREDICTION)
        rows["ts"], rows["step"] = times[fresh], step
        rows["prediction"] = stats["predictions"].cpu().numpy()[fresh]
        rows["label"] = stats["labels"].cpu().numpy()[fresh]
        self._file.append(rows.tobytes())
        return finite(stats["loss"]), len(rows)

    def weights(self) -> dict[str, Any] | None:
        """The reward model's state for a checkpoint; None without one."""
        return self._model.state_dict() if self._model is not None else None

    def state(self) -> dict[str, Any]:
        """The optimiser's state."""
        return self._optimizer.state_dict() if self._optimizer is not None else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Set the optimiser to `state()`."""
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state)
