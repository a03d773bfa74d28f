"""What a generated session earns in reinforcement: preference, format and industrial reward (technical report,
arXiv 2506.13695, reward system).

Shapes: B users, G sessions a user, T history items, m items, L levels, D leaves of the trie.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.trie import Trie
from onerec.errors import UserError
from trainer.config import RewardConfig
from trainer.model import newest_first
from trainer.reward import RewardModel, combine

T = TypeVar("T")

ItemFunction = Callable[[list[str]], float]
"""A user's reward: item ids of a session, in order, to a number."""


class Legality(NamedTuple):
    """Which generated sessions are sessions of items: the format reward, 1 where `sessions`, else 0."""

    sessions: NDArray[np.bool_]  # [B, G]: every item is real, and none is used more often than there are items of its codes
    items: NDArray[np.bool_]  # [B, G, m]: the codes are in the catalogue
    leaves: NDArray[np.int64]  # [B, G, m], -1 where they are not


def legality(trie: Trie, codes: NDArray[np.integer]) -> Legality:
    """The legality of sessions `codes [B, G, m, L]` that were written without the trie."""
    leaves = trie.lookup(codes)
    items = leaves >= 0
    use = np.tril(leaves[..., :, None] == leaves[..., None, :], k=-1).sum(-1)
    spare = use < np.diff(trie.leaf_pointers)[np.maximum(leaves, 0)]
    return Legality((items & spare).all(-1), items, leaves)


class IndustrialReward:
    """A user's function as a reward. A session that it raises on, or gives no finite number for, has none.

    `faults` counts those; the first is told to `warn`, with the session and what to do.
    """

    def __init__(self, function: ItemFunction, item_ids: Sequence[str], *, name: str, warn: Callable[[str], None]) -> None:
        self._function, self._ids, self._name, self._warn = function, item_ids, name, warn
        self.faults = 0

    def __call__(self, rows: NDArray[np.integer]) -> float:
        """The reward of the session of catalogue `rows [m]`; NaN where the function failed."""
        items = [self._ids[row] for row in rows]
        try:
            value = float(self._function(items))
            fault = None if math.isfinite(value) else f"gave {value}"
        except Exception as error:  # whatever a user's code raises is his fault to hear of, not the end of a training run
            fault = f"raised {type(error).__name__}: {error}"
        if fault is None:
            return value
        self.faults += 1
        if self.faults == 1:
            self._warn(
                f"the reward {self._name} {fault} for the session {items}; such sessions are left out and counted "
                "(faults), never taken as 0: mend the function"
            )
        return math.nan


def load_function(spec: str) -> ItemFunction:
    """The function named by `module:function` or `FILE.py:function`.

    Raises UserError for what cannot be imported, is not there or is no function.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UserError(f"--industrial {spec}: give module:function or FILE.py:function")
    module = _load_file(Path(place), spec) if place.endswith(".py") else _load_module(place, spec)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--industrial {spec}: {place} has no function {name}; define it, or mend the name")
    return function


def _load_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"--industrial {spec}: there is no file {path}; mend the path")
    found = importlib.util.spec_from_file_location(f"onerec_industrial_{path.stem}", path)
    if found is None or found.loader is None:
        raise UserError(f"--industrial {spec}: {path} is no Python file; give FILE.py:function")
    module, loader = importlib.util.module_from_spec(found), found.loader
    sys.modules[found.name] = module
    _imported(lambda: loader.exec_module(module), spec)
    return module


def _load_module(name: str, spec: str) -> ModuleType:
    return _imported(lambda: importlib.import_module(name), spec)


def _imported(load: Callable[[], T], spec: str) -> T:
    try:
        return load()
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise UserError(
            f"--industrial {spec} cannot be imported ({type(error).__name__}: {error}); mend it, or the name"
        ) from error


class Earned(NamedTuple):
    """What sessions earned."""

    rewards: NDArray[np.float64]  # [B, G], NaN = none: not legal, or the user's function failed
    preference: NDArray[np.float64]  # [B, G], the reward model's part, NaN where not legal
    industrial: NDArray[np.float64]  # [B, G], the user's part, NaN where none
    legality: Legality


class PolicyRewards:
    """r = R(u, S) + w · industrial(S) of legal sessions; what is not legal earns nothing, and is no group member.

    R is the reward model's combined reward (eq. 6, 9: `trainer.reward.combine`), in (0, 1); so a user's function counts
    as much as R when it moves by a like amount.
    """

    def __init__(
        self,
        trie: Trie,
        reward_model: RewardModel,
        reward: RewardConfig,
        *,
        industrial: IndustrialReward | None = None,
        industrial_weight: float = 1.0,
    ) -> None:
        self.trie = trie
        self.industrial = industrial
        self._model, self._config, self._weight = reward_model.eval(), reward, industrial_weight

    @property
    def faults(self) -> int:
        """Sessions that the user's function failed on so far."""
        return 0 if self.industrial is None else self.industrial.faults

    def __call__(self, history: Tensor, history_mask: Tensor, codes: Tensor) -> Earned:
        """The rewards of sessions `codes [B, G, m, L]` for users with `history [B, T, L]`, `history_mask [B, T]`."""
        legal = legality(self.trie, codes.cpu().numpy())
        preference = np.where(legal.sessions, self._preference(history, history_mask, codes), np.nan)
        industrial = np.full(preference.shape, np.nan)
        if self.industrial is None:
            return Earned(preference, preference, industrial, legal)
        for place in zip(*np.nonzero(legal.sessions), strict=True):
            industrial[place] = self.industrial(self.trie.session_rows(legal.leaves[place]))
        return Earned(preference + self._weight * industrial, preference, industrial, legal)

    @torch.no_grad()
    def _preference(self, history: Tensor, history_mask: Tensor, codes: Tensor) -> NDArray[np.float64]:
        length = self._model.config.history_length
        if history.shape[1] > length:
            # Newest first, cut, and turned around again.
            newest = torch.gather(history, 1, newest_first(history_mask, history.shape[2]))[:, :length]
            history_mask = torch.arange(length, device=history.device) < history_mask.sum(1, keepdim=True)
            history = torch.gather(newest, 1, newest_first(history_mask, history.shape[2]))
        mask = torch.ones(codes.shape[:3], dtype=torch.bool, device=codes.device)
        rewards = self._model.rewards(history, history_mask, codes, mask)
        return combine(rewards, self._config).double().cpu().numpy()
