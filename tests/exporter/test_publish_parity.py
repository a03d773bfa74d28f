"""The parity check passes what is the same search and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.parity import REWARD_TOLERANCE, SCORE_TOLERANCE, compare, compare_rewards
from onerec.errors import Failure
from serving_config.recommend.engine import Beams


def beams(scores: list[float], *, dead: int = 0) -> Beams:
    leaves = np.arange(len(scores) * 3, dtype=np.int64).reshape(1, -1, 3)
    leaves[:, len(scores) - dead :] = -1
    return Beams(leaves, np.array([scores], dtype=np.float32))


def swapped(found: Beams, a: int, b: int) -> Beams:
    leaves = found.leaves.copy()
    leaves[:, [a, b]] = leaves[:, [b, a]]
    return Beams(leaves, found.scores)


def test_the_same_beams_pass_with_the_largest_difference() -> None:
    reference = beams([-1.0, -2.0, -3.0, -4.0])
    served = Beams(reference.leaves, reference.scores + np.float32(SCORE_TOLERANCE / 4))
    parity = compare(reference, served)
    assert (parity.histories, parity.sessions) == (1, 4)
    assert parity.score_difference == pytest.approx(SCORE_TOLERANCE / 4, rel=0.01)


def test_another_order_of_clearly_different_scores_is_refused() -> None:
    reference = beams([-1.0, -2.0, -3.0, -4.0])
    for a, b in ((0, 1), (1, 2), (0, 2)):
        with pytest.raises(Failure, match="session .* differs"):
            compare(reference, swapped(reference, a, b))


def test_scores_equal_within_the_tolerance_may_change_places() -> None:
    reference = beams([-1.0, -2.0, -2.0 - SCORE_TOLERANCE / 2, -4.0])
    compare(reference, swapped(reference, 1, 2))
    with pytest.raises(Failure):
        compare(reference, swapped(reference, 0, 1))


def test_a_wrong_score_or_another_number_of_sessions_is_refused() -> None:
    reference = beams([-1.0, -2.0, -3.0])
    with pytest.raises(Failure, match="scores of history 0"):
        compare(reference, Beams(reference.leaves, reference.scores + np.float32(2 * SCORE_TOLERANCE)))
    with pytest.raises(Failure, match="differ by nan"):
        compare(reference, Beams(reference.leaves, reference.scores * np.float32(np.nan)))
    with pytest.raises(Failure, match="torch finds 3 sessions"):
        compare(reference, beams([-1.0, -2.0, -3.0], dead=1))


def test_dead_beams_are_not_compared() -> None:
    reference = beams([-1.0, -2.0, -6e4], dead=1)
    served = Beams(reference.leaves, np.array([[-1.0, -2.0, -5e4]], dtype=np.float32))
    assert compare(reference, served).sessions == 2


def test_rewards_pass_within_the_tolerance_and_nothing_else() -> None:
    reference = np.random.default_rng(0).random((2, 5, 4)).astype(np.float32)
    served = reference + np.float32(REWARD_TOLERANCE / 4)
    parity = compare_rewards(reference, served)
    assert (parity.histories, parity.sessions) == (2, 5)
    assert parity.difference == pytest.approx(REWARD_TOLERANCE / 4, rel=0.01)
    for fault in (2 * REWARD_TOLERANCE, np.nan):
        spoilt = reference.copy()
        spoilt[1, 2, 3] += fault
        with pytest.raises(Failure, match="rewards differ"):
            compare_rewards(reference, spoilt)
