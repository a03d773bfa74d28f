"""The judge: figures that a person computes by hand, and what must hold for any recommender."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onerec.errors import UserError
from simulator.world import DAY_MS, World, WorldConfig
from trainer.baselines import PopularityRanker
from trainer.judge import (
    Case,
    ItemFacts,
    Judgement,
    diversity,
    is_legal,
    judge,
    mean_and_deviation,
    new_share,
    true_rewards,
)
from trainer.rankings import RankingRecommender

ITEMS = 12
DAY = 1_704_067_200_000


def facts(items: int = ITEMS) -> ItemFacts:
    """Two items a topic; item i came in i hours before the day began."""
    return ItemFacts(DAY - 3_600_000 * np.arange(items), np.arange(items) // 2, "topic")


def case(history: Sequence[int], targets: Sequence[int], user: str = "u0", ts: int = DAY) -> Case:
    """A case of given rows."""
    return Case(user, ts, np.array(history, np.int32), np.array(targets, np.int32))


class Fixed:
    """Answers every case with the same ranking and the same sessions."""

    def __init__(self, ranking: Sequence[int], sessions: Sequence[Sequence[int]]) -> None:
        self.ranking, self.found = np.array(ranking, np.int32), np.array(sessions, np.int32)

    def items(self, cases: Sequence[Case], k: int) -> list[np.ndarray]:
        return [self.ranking[:k] for _ in cases]

    def sessions(self, cases: Sequence[Case], count: int) -> list[np.ndarray]:
        return [self.found[:count] for _ in cases]


class Perfect:
    """Knows what comes."""

    def items(self, cases: Sequence[Case], k: int) -> list[np.ndarray]:
        return [one.targets[:k] for one in cases]

    def sessions(self, cases: Sequence[Case], count: int) -> list[np.ndarray]:
        return [one.targets[None] for one in cases]


def test_popularity_on_a_tiny_log_scores_what_a_person_computes() -> None:
    # Counts: 0 three times, 1 and 2 twice, 3 once; equals by the lower row: 0, 1, 2, 3.
    ranker = PopularityRanker(ITEMS)
    ranker.fit([[0, 1, 2], [0, 2], [0, 1, 3]])
    found = judge(
        RankingRecommender(ranker, 2), [case([5], [2, 0]), case([], [7, 1]), case([1], [0])], facts(), width=3
    )
    # Next items 2, 7, 0 stand in places 3, 8, 1: what was never seen follows by row.
    assert found.hr5 == pytest.approx(2 / 3)
    assert found.hr10 == pytest.approx(1.0)
    assert found.ndcg5 == pytest.approx((1 / math.log2(4) + 0 + 1) / 3)
    assert found.ndcg10 == pytest.approx((1 / math.log2(4) + 1 / math.log2(9) + 1) / 3)
    # The likeliest pair is {0, 1}: it has the 0 of {2, 0} in place 1, the 1 of {7, 1} in place 2, and 0.
    assert found.session_hit == 1.0
    assert found.session_recall == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    ideal = 1 + 1 / math.log2(3)
    assert found.session_ndcg == pytest.approx((1 / ideal + (1 / math.log2(3)) / ideal + 1) / 3)
    assert found.coverage == pytest.approx(2 / ITEMS)
    assert found.legal == 1.0
    # Items 0 and 1 are of one topic, and both came in within the last day.
    assert (found.diversity, found.new_items) == (0.0, 1.0)
    assert found.reward is None and found.true_reward is None


def test_a_perfect_recommender_scores_one_everywhere() -> None:
    cases = [case([], rng.permutation(ITEMS)[:5]) for rng in map(np.random.default_rng, range(20))]
    found = judge(Perfect(), cases, facts(), width=4)
    for name in ("hr5", "hr10", "ndcg5", "ndcg10", "session_hit", "session_recall", "session_ndcg", "legal"):
        assert getattr(found, name) == pytest.approx(1.0), name


@given(st.permutations(range(ITEMS)), st.integers(0, 2**32 - 1))
def test_no_metric_depends_on_how_the_items_are_numbered(order: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    renamed, known = np.array(order), facts()
    place = np.argsort(renamed)
    cases = [case(rng.permutation(ITEMS)[:3], rng.permutation(ITEMS)[: rng.integers(1, 6)]) for _ in range(3)]
    ranking, sessions = rng.permutation(ITEMS), np.stack([rng.permutation(ITEMS)[:5] for _ in range(4)])
    before = judge(Fixed(ranking, sessions), cases, known, width=4)
    after = judge(
        Fixed(renamed[ranking], renamed[sessions]),
        [one._replace(history=renamed[one.history], targets=renamed[one.targets]) for one in cases],
        ItemFacts(known.upload_ms[place], known.labels[place], "topic"),
        width=4,
    )
    assert_equal(before, after)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_metrics_are_means_over_cases(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    cases = [case([], rng.permutation(ITEMS)[:5], ts=DAY + int(rng.integers(DAY_MS))) for _ in range(count)]
    recommender = Fixed(rng.permutation(ITEMS), np.stack([rng.permutation(ITEMS)[:5] for _ in range(3)]))
    together = judge(recommender, cases, facts(), width=3)
    apart = [judge(recommender, [one], facts(), width=3) for one in cases]
    for name in ("hr5", "ndcg10", "session_recall", "session_ndcg", "diversity", "new_items", "sessions"):
        assert getattr(together, name) == pytest.approx(np.mean([getattr(one, name) for one in apart])), name


def test_rewards_are_mean_max_and_that_of_the_session_shown() -> None:
    values = {0: [0.1, 0.2, 0.3, 0.4], 1: [0.5, 0.0, 0.1, 0.2], 2: [0.3, 0.4, 0.2, 0.0]}
    sessions = [[0, 3], [1, 4], [2, 5]]
    found = judge(
        Fixed(range(5), sessions), [case([], [0]), case([], [1])], facts(), width=3,
        reward=lambda one, rows: np.array([values[row] for row in rows[:, 0].tolist()]),
    )
    assert found.reward is not None
    assert found.reward["swt"] == pytest.approx({"mean": 0.3, "max": 0.5, "first": 0.1})
    assert found.reward["ltr"] == pytest.approx({"mean": 0.2, "max": 0.4, "first": 0.4})


def test_a_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        judge(Fixed([0], [[0, 1]]), [case([], [0])], facts(), width=1, reward=lambda one, rows: np.full((1, 4), np.nan))


def test_without_cases_there_is_nothing_to_say() -> None:
    with pytest.raises(UserError, match="no test case"):
        judge(Perfect(), [], facts(), width=1)


def test_true_rewards_are_those_of_the_world_on_the_day_of_the_case() -> None:
    world = World(WorldConfig(users=5, items=40, days=4, seed=3))
    known = true_rewards(world, [f"v{item}" for item in range(39, -1, -1)])
    sessions = np.array([[0, 1, 2], [5, 9, 7]], np.int32)
    for day in (0, 3):
        told = known(case([], [0], user="u4", ts=DAY + day * DAY_MS + 5), sessions)
        for rewards, session in zip(told, sessions, strict=True):
            expected = world.true_reward("u4", [f"v{39 - row}" for row in session.tolist()], day)
            assert rewards == pytest.approx(list(expected))
    with pytest.raises(UserError, match="not of this simulated world"):
        known(case([], [0], user="somebody"), sessions)


def test_what_is_legal_what_differs_and_what_is_new() -> None:
    assert is_legal(np.array([0, 5, 11]), ITEMS)
    assert not is_legal(np.array([0, 5, 5]), ITEMS)
    assert not is_legal(np.array([0, 12, 5]), ITEMS)
    assert not is_legal(np.array([0, -1, 5]), ITEMS)
    labels = np.array([0, 0, 1, 2])
    assert diversity(np.array([0, 1, 2]), labels) == pytest.approx(2 / 3)
    assert diversity(np.array([0, 2, 3]), labels) == 1.0
    assert diversity(np.array([0]), labels) == 0.0
    uploads = np.array([0, 1, DAY_MS + 1])
    assert new_share(np.array([0, 1, 2]), uploads, DAY_MS) == pytest.approx(2 / 3)


def test_mean_and_deviation_over_seeds() -> None:
    found = mean_and_deviation([{"a": 1.0, "b": 2.0}, {"a": 3.0}])
    assert found["a"] == pytest.approx((2.0, math.sqrt(2)))
    assert found["b"] == (2.0, 0.0)


def assert_equal(left: Judgement, right: Judgement) -> None:
    """All metrics of two judgements agree."""
    for name, value in left.line().items():
        assert right.line()[name] == pytest.approx(value), name
