"""Sessions from item scores against all that there are."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.rankings import BLOCK, RankingRecommender, best_rows, best_sessions

scores = st.lists(
    st.one_of(st.integers(-4, 0).map(float), st.floats(-9, 0), st.just(-np.inf)), min_size=1, max_size=9
).map(lambda values: np.array(values, np.float64))


@given(scores, st.integers(1, 4), st.integers(1, 40))
def test_the_best_sessions_are_those_that_trying_all_finds(log_probs: np.ndarray, m: int, count: int) -> None:
    possible = [row for row, value in enumerate(log_probs) if value > -np.inf]
    sums = sorted((log_probs[list(rows)].sum() for rows in itertools.combinations(possible, m)), reverse=True)
    found = best_sessions(log_probs, m, count)
    assert len(found) == min(count, len(sums))
    assert log_probs[found].sum(axis=1) == pytest.approx(np.array(sums[:count])) if len(found) else True
    assert len({frozenset(rows) for rows in found.tolist()}) == len(found)
    for rows in found.tolist():
        assert len(set(rows)) == m and set(rows) <= set(possible)
        assert all(log_probs[a] >= log_probs[b] for a, b in itertools.pairwise(rows))


@given(scores, st.integers(1, 12))
def test_the_best_rows_are_those_of_a_stable_sort(log_probs: np.ndarray, k: int) -> None:
    order = sorted((row for row in range(len(log_probs)) if log_probs[row] > -np.inf), key=lambda row: -log_probs[row])
    assert best_rows(log_probs, k).tolist() == order[:k]


def test_a_large_catalogue_with_equal_scores_at_the_edge_keeps_the_lower_rows() -> None:
    log_probs = np.full(1000, -3.0, np.float32)
    log_probs[[700, 40]] = -1.0
    assert best_rows(log_probs, 5).tolist() == [40, 700, 0, 1, 2]
    assert best_sessions(log_probs, 2, 3).tolist() == [[40, 700], [40, 0], [40, 1]]


class Moment(NamedTuple):
    history: np.ndarray


class Repeating:
    """The item after the last of the history is likeliest, the one after that the next."""

    def log_probs(self, histories: list[np.ndarray]) -> np.ndarray:
        return np.stack([-((np.arange(7) - history[-1] - 1) % 7) for history in histories]).astype(np.float32)


def test_an_item_ranker_recommends_items_and_sessions_of_each_case() -> None:
    cases = [Moment(np.array([place % 7], np.int32)) for place in range(BLOCK + 3)]
    recommender = RankingRecommender(Repeating(), 3)
    items, sessions = recommender.items(cases, 2), recommender.sessions(cases, 4)
    assert len(items) == len(sessions) == len(cases)
    for case, ranked, found in zip(cases, items, sessions, strict=True):
        last = int(case.history[-1])
        assert ranked.tolist() == [(last + 1) % 7, (last + 2) % 7]
        assert found[0].tolist() == [(last + step) % 7 for step in (1, 2, 3)]
        assert found.shape == (4, 3) and found.dtype == np.int32
