"""What a recommender is worth on test cases: next item, session, rewards, legality, coverage, diversity, new items.

Rules. The next item is the first target of a case, ranked against the whole catalogue, nothing filtered out; with one
relevant item hit rate and recall are the same. A case's sessions are the `width` best that the recommender generates:
`mean` and `max` of a reward are over these, then averaged over cases; `first` is that of the best one, which is what
would be shown. Coverage, diversity and new items are of the shown sessions too. Shapes: N items, L levels, m items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from onerec.errors import UserError
from trainer.data import pad_histories
from trainer.evaluate import RANKED, add, rank_scores, session_scores
from trainer.reward_weights import TARGETS

if TYPE_CHECKING:
    import torch

    from simulator.world import World
    from trainer.model import OneRec
    from trainer.reward import RewardModel

DAY_MS = 86_400_000
CASES_AT_ONCE = 16
SESSIONS_AT_ONCE = 512


class Case(NamedTuple):
    """A moment at which a user is shown a session; rows of the catalogue, history oldest first, `ts` in ms."""

    user_id: str
    ts: int
    history: np.ndarray  # int32 [h]
    targets: np.ndarray  # int32 [1..m]: what he watched


class Recommender(Protocol):
    """What can be judged."""

    def items(self, cases: Sequence[Case], k: int) -> list[np.ndarray]:
        """The `k` best next items of each case, rows of the whole catalogue, best first; fewer where fewer are known."""

    def sessions(self, cases: Sequence[Case], count: int) -> list[np.ndarray]:
        """Rows [n, m] of the n <= `count` best sessions of each case, best first."""


@runtime_checkable
class FreeRecommender(Protocol):
    """A recommender that writes codes, and could write some that name no item."""

    def legality(self, cases: Sequence[Case], count: int) -> float:
        """Share of the `count` best sessions of each case, searched for without the trie, that are legal."""


class ItemFacts(NamedTuple):
    """What judging needs to know of the catalogue's items, by row."""

    upload_ms: NDArray[np.int64]  # [N]: when an item came in
    labels: NDArray[np.int64]  # [N]: of two items of a session with the same label, one is more of the same
    label: str  # what the labels are: "topic", "author" or "level-1 code"


RewardFunction = Callable[[Case, np.ndarray], np.ndarray]
"""Rewards [n, 4] of the sessions [n, m] (rows) shown to a case, in the order of TARGETS."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """Means over `cases`; rewards None where nobody could tell them."""

    cases: int
    hr5: float
    hr10: float
    ndcg5: float
    ndcg10: float
    session_hit: float
    session_recall: float
    session_ndcg: float
    legal: float
    coverage: float
    diversity: float
    diversity_by: str
    new_items: float
    sessions: float
    reward: dict[str, dict[str, float]] | None
    true_reward: dict[str, dict[str, float]] | None

    def line(self) -> dict[str, object]:
        """For JSON, with the names that the field uses (`hr@10`)."""
        record = dataclasses.asdict(self)
        return {_JSON_NAMES.get(name, name): value for name, value in record.items()}


_JSON_NAMES = {"hr5": "hr@5", "hr10": "hr@10", "ndcg5": "ndcg@5", "ndcg10": "ndcg@10"}


def judge(
    recommender: Recommender,
    cases: Sequence[Case],
    facts: ItemFacts,
    *,
    width: int,
    reward: RewardFunction | None = None,
    truth: RewardFunction | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Judgement:
    """Every metric of `recommender` over `cases`, with `width` sessions a case; `progress` gets the cases done.

    Raises UserError without cases.
    """
    if not cases:
        raise UserError("there is no test case to judge by; give a log with a session that is not learnt")
    totals: dict[str, float] = {}
    modelled, true = _RewardMeans(reward), _RewardMeans(truth)
    shown: set[int] = set()
    legal = generated = 0
    for part in _parts(cases):
        rankings = recommender.items(part, RANKED)
        sessions = recommender.sessions(part, width)
        for case, ranked, found in zip(part, rankings, sessions, strict=True):
            targets = case.targets.tolist()
            add(totals, rank_scores(ranked[:RANKED].tolist(), targets[0]))
            best = found[0] if len(found) else np.empty(0, np.int32)
            add(totals, session_scores(best.tolist(), targets))
            add(totals, {"diversity": diversity(best, facts.labels), "new": new_share(best, facts.upload_ms, case.ts)})
            shown.update(best.tolist())
            legal += sum(is_legal(rows, len(facts.upload_ms)) for rows in found)
            generated += len(found)
            modelled.add(case, found)
            true.add(case, found)
        progress(len(part))
    count = len(cases)
    free = recommender.legality(cases, width) if isinstance(recommender, FreeRecommender) else None
    return Judgement(
        cases=count,
        hr5=totals["hit@5"] / count,
        hr10=totals["hit@10"] / count,
        ndcg5=totals["ndcg@5"] / count,
        ndcg10=totals["ndcg@10"] / count,
        session_hit=totals["session_hit"] / count,
        session_recall=totals["session_recall"] / count,
        session_ndcg=totals["session_ndcg"] / count,
        legal=free if free is not None else legal / max(1, generated),
        coverage=len(shown) / len(facts.upload_ms),
        diversity=totals["diversity"] / count,
        diversity_by=facts.label,
        new_items=totals["new"] / count,
        sessions=generated / count,
        reward=modelled.means(),
        true_reward=true.means(),
    )


def diversity(session: np.ndarray, labels: NDArray[np.int64]) -> float:
    """Share of the pairs of items of a session [m] whose labels differ; 0 for a session of fewer than two items."""
    mine = labels[session]
    pairs = len(mine) * (len(mine) - 1) // 2
    if not pairs:
        return 0.0
    return 1.0 - float(np.triu(mine[:, None] == mine[None, :], k=1).sum()) / pairs


def new_share(session: np.ndarray, upload_ms: NDArray[np.int64], ts: int) -> float:
    """Share of the items of a session [m] that came in less than 24 h before `ts`."""
    return float((upload_ms[session] > ts - DAY_MS).mean()) if len(session) else 0.0


def is_legal(session: np.ndarray, items: int) -> bool:
    """Whether all rows of a session [m] are items of the catalogue and no two are the same."""
    return bool(((session >= 0) & (session < items)).all()) and len(np.unique(session)) == len(session)


class _RewardMeans:
    """Mean over cases of mean, max and first of each reward over a case's sessions; a case without any counts as 0."""

    def __init__(self, function: RewardFunction | None) -> None:
        self._function = function
        self._totals = np.zeros((3, len(TARGETS)))
        self._cases = 0

    def add(self, case: Case, sessions: np.ndarray) -> None:
        if self._function is None:
            return
        self._cases += 1
        if len(sessions):
            rewards = np.asarray(self._function(case, sessions), np.float64)
            if not np.isfinite(rewards).all():
                raise UserError(f"a reward of user {case.user_id} at {case.ts} is not finite; look at the reward model")
            self._totals += np.stack([rewards.mean(axis=0), rewards.max(axis=0), rewards[0]])

    def means(self) -> dict[str, dict[str, float]] | None:
        if self._function is None:
            return None
        mean, most, first = (self._totals / max(1, self._cases)).tolist()
        return {
            name: {"mean": mean[place], "max": most[place], "first": first[place]}
            for place, name in enumerate(TARGETS)
        }


def true_rewards(world: World, item_ids: Sequence[str]) -> RewardFunction:
    """The simulated world's own expected rewards, on the day of the case; raises UserError for a foreign id."""
    rows_of_world = np.array([_of_world(world.item_index, item_id) for item_id in item_ids], np.int64)

    def rewards(case: Case, sessions: np.ndarray) -> np.ndarray:
        user = _of_world(world.user_index, case.user_id)
        day = int((case.ts - world.config.start_ms) // DAY_MS)
        found = []
        for begin in range(0, len(sessions), SESSIONS_AT_ONCE):
            part = rows_of_world[sessions[begin : begin + SESSIONS_AT_ONCE]]
            told = world.true_rewards(np.full(len(part), user), part, day)
            found.append(np.stack([getattr(told, name) for name in TARGETS], axis=1))
        return np.concatenate(found)

    return rewards


def _of_world(index: Callable[[str], int], name: str) -> int:
    try:
        return index(name)
    except KeyError:
        raise UserError(
            f"{name} is not of this simulated world; give the options that `onerec simulate` made the log with"
        ) from None


def modelled_rewards(model: RewardModel, item_codes: np.ndarray, *, history_length: int) -> RewardFunction:
    """What the reward model expects, from the `history_length` newest items of a case; `item_codes` [N, L]."""
    import torch

    codes = torch.from_numpy(np.asarray(item_codes, np.int64))
    model.eval()

    def rewards(case: Case, sessions: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(np.asarray(case.history[-history_length:], np.int64))
        history = codes[rows].unsqueeze(0) if len(rows) else codes[:1].unsqueeze(0)
        mask = torch.full(history.shape[:2], bool(len(rows)))
        windows = codes[torch.from_numpy(np.asarray(sessions, np.int64))].unsqueeze(0)
        with torch.no_grad():
            found: torch.Tensor = model.rewards(history, mask, windows, torch.ones(windows.shape[:3], dtype=torch.bool))
        return found[0].numpy()

    return rewards


class OneRecRecommender:
    """A OneRec model (or TIGER, m = 1 of the same) with the trie of its catalogue, by the search that serves."""

    def __init__(self, model: OneRec, item_codes: np.ndarray, *, device: str = "cpu") -> None:
        from exporter.trie import build_trie
        from trainer.beam import trie_tensors

        self.model = model.eval()
        self.trie = build_trie(item_codes, model.config.codes)
        self._item_codes, self._device = item_codes, device
        self._tensors = trie_tensors(self.trie, device)

    def items(self, cases: Sequence[Case], k: int) -> list[np.ndarray]:
        """By a search for one item, items of one semantic ID in catalogue order; see `Recommender`."""
        from trainer.beam import finish, first_item

        found = []
        for part in _parts(cases):
            state, _ = first_item(self.model, self._tensors, *self._histories(part), width=max(k, 4 * RANKED))
            for leaves in finish(state).leaves[:, :, 0].cpu().numpy():
                rows = [self.trie.leaf_items(int(leaf)) for leaf in leaves if leaf >= 0]
                found.append(np.concatenate([*rows, np.empty(0, np.int32)])[:k].astype(np.int32))
        return found

    def sessions(self, cases: Sequence[Case], count: int) -> list[np.ndarray]:
        """By beam search, `count` wide; see `Recommender`."""
        from trainer.beam import beam_search

        found = []
        for part in _parts(cases):
            beams = beam_search(self.model, self._tensors, *self._histories(part), width=count)
            for leaves, alive in zip(beams.leaves.cpu().numpy(), beams.alive.cpu().numpy(), strict=True):
                found.append(self.trie.session_rows(leaves[alive]).astype(np.int32))
        return found

    def legality(self, cases: Sequence[Case], count: int) -> float:
        """Share of sessions, searched without the trie, whose tuples all name items, none used up; see FreeRecommender."""
        from trainer.beam import free_search

        legal = total = 0
        for part in _parts(cases):
            codes = free_search(self.model, *self._histories(part), width=count).codes.cpu().numpy()
            leaves = self.trie.lookup(codes)
            flat = leaves.reshape(-1, leaves.shape[-1])
            total += len(flat)
            legal += sum(self._is_legal(session) for session in flat[(flat >= 0).all(axis=1)])
        return legal / total

    def _is_legal(self, leaves: np.ndarray) -> bool:
        """Whether no leaf of a session [m] is used more often than it has items, so that its items can differ."""
        used, times = np.unique(leaves, return_counts=True)
        return all(count <= len(self.trie.leaf_items(int(leaf))) for leaf, count in zip(used, times, strict=True))

    def _histories(self, cases: Sequence[Case]) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [B, T, L] and mask [B, T] of the cases' histories, the newest that the model reads."""
        import torch

        newest = [case.history[-self.model.config.history_length :] for case in cases]
        history, mask = pad_histories(newest, self._item_codes)
        return torch.from_numpy(history).to(self._device), torch.from_numpy(mask).to(self._device)


def _parts(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    """The cases, a few at a time: the memory of a search grows with them."""
    for begin in range(0, len(cases), CASES_AT_ONCE):
        yield cases[begin : begin + CASES_AT_ONCE]


def mean_and_deviation(lines: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and sample deviation (0 for one line) of every number over the lines that have it."""
    names = {name for line in lines for name in line}
    found = {}
    for name in names:
        values = np.array([line[name] for line in lines if name in line], np.float64)
        found[name] = (float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0)
    return found
