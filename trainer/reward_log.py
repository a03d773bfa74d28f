"""RUN/rewards.bin: what the reward model predicted of each window before it learnt it, and what came."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

REWARDS_FILE = "rewards.bin"
PREDICTION = np.dtype([("ts", "<i8"), ("step", "<i4"), ("prediction", "<f4", (4,)), ("label", "<f4", (4,))])
"""A window: event time of its session's start in ms, the step that learnt it, and per tower swt, vtr, wtr, ltr."""


def read_rewards(run_dir: Path) -> NDArray[np.void]:
    """All whole rows of a run, in the order learnt, as dtype `PREDICTION` [n]; none where the run has no reward model."""
    path = run_dir / REWARDS_FILE
    content = path.read_bytes() if path.exists() else b""
    return np.frombuffer(content[: len(content) // PREDICTION.itemsize * PREDICTION.itemsize], PREDICTION)
