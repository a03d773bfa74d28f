"""Metrics and baselines against values worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.baselines import CoVisitation, Popularity
from trainer.config import ModelConfig
from trainer.data import Example
from trainer.evaluate import (
    Line,
    ModelScorer,
    bins,
    is_scored,
    mean_loss,
    means,
    rank_scores,
    read_metrics,
    score_baselines,
    session_scores,
)
from trainer.model import OneRec


def example(history: list[int], targets: list[int], name: str = "u:1") -> Example:
    return Example(name, 0, np.array(history, np.int32), np.array(targets, np.int32), True, True)


def line(step: int, scored: int = 1, **fields: object) -> Line:
    content = dict(
        step=step, round=0, sequence=step, ts=step, sessions=1, windows=1, codes=10, loss=1.0, gradient=1.0,
        applied=True, expert_load=None, scored=scored, scores={"onerec": {"hit@1": 0.5 * scored}},
    )
    return Line(**(content | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (1, {"hit@1": 1, "hit@5": 1, "hit@10": 1, "ndcg@5": 1, "ndcg@10": 1}),
        (3, {"hit@1": 0, "hit@5": 1, "hit@10": 1, "ndcg@5": 0.5, "ndcg@10": 0.5}),
        (7, {"hit@1": 0, "hit@5": 0, "hit@10": 1, "ndcg@5": 0, "ndcg@10": 1 / 3}),
        (11, {"hit@1": 0, "hit@5": 0, "hit@10": 0, "ndcg@5": 0, "ndcg@10": 0}),
    ],
)
def test_rank_scores_by_hand(place: int, expected: dict[str, float]) -> None:
    ranked = [100 + i for i in range(1, 12)]
    assert rank_scores(ranked, 100 + place) == pytest.approx(expected)


def test_session_scores_by_hand() -> None:
    scores = session_scores([7, 1, 8, 2, 9], [1, 2, 3])
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    ideal = 1 + 1 / math.log2(3) + 0.5
    assert scores == pytest.approx({"session_hit": 1, "session_recall": 2 / 3, "session_ndcg": gain / ideal})
    assert session_scores([4, 5], [1])["session_hit"] == 0
    assert session_scores([], [1]) == {"session_hit": 0, "session_recall": 0, "session_ndcg": 0}


def test_an_item_watched_twice_counts_once() -> None:
    assert session_scores([1, 2], [1, 1]) == {"session_hit": 1, "session_recall": 1, "session_ndcg": 1}


def test_popularity_ranks_by_count_then_row() -> None:
    popularity = Popularity()
    assert popularity.rank(3) == []
    for targets in ([5, 2], [5, 9], [9, 2], [5]):
        popularity.observe(targets)
    assert popularity.rank(2) == [5, 2]
    assert popularity.rank(9) == [5, 2, 9]


def test_fading_popularity_follows_the_change() -> None:
    fading, plain = Popularity(half_life=2), Popularity()
    for row in [1] * 6 + [2] * 4:
        fading.observe([row])
        plain.observe([row])
    assert plain.rank(1) == [1] and fading.rank(1) == [2]
    # two windows ago weighs half: 2^-(age/2) summed
    assert fading.count(2) / fading.count(1) == pytest.approx(
        sum(2 ** (-a / 2) for a in range(4)) / sum(2 ** (-a / 2) for a in range(4, 10))
    )


def test_covisitation_follows_the_last_item_then_popularity() -> None:
    covisitation = CoVisitation()
    covisitation.observe([3, 1], [10, 11])
    covisitation.observe([1], [10])
    covisitation.observe([2], [20])
    covisitation.observe([4], [20])
    covisitation.observe([5], [20])
    assert covisitation.rank([9, 1], 4) == [10, 11, 20]
    assert covisitation.rank([10], 2) == [11, 20]
    assert covisitation.rank([], 2) == [20, 10]


def test_followers_of_an_item_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.baselines.covisitation.FOLLOWERS", 2)
    covisitation = CoVisitation()
    for row in (10, 10, 11, 12):
        covisitation.observe([1], [row])
    assert covisitation.rank([1], 2) == [10, 12]


def test_baselines_come_back_from_their_state() -> None:
    covisitation, fading = CoVisitation(), Popularity(half_life=3)
    for i in range(30):
        covisitation.observe([i % 4], [i % 7, i % 5])
        fading.observe([i % 7])
    other, faded = CoVisitation(), Popularity(half_life=3)
    other.restore(covisitation.state())
    faded.restore(fading.state())
    assert all(other.rank([i], 9) == covisitation.rank([i], 9) for i in range(8))
    assert faded.rank(9) == fading.rank(9)
    other.observe([0], [6])
    covisitation.observe([0], [6])
    assert all(np.array_equal(value, covisitation.state()[name]) for name, value in other.state().items())


def test_baselines_are_scored_by_hand() -> None:
    popularity, covisitation = Popularity(), CoVisitation()
    for history, targets in (([1], [10]), ([2], [20]), ([2], [20])):
        popularity.observe(targets)
        covisitation.observe(history, targets)
    totals = score_baselines([example([1], [10, 20]), example([3], [20])], popularity, covisitation, m=2)
    assert totals["popularity"]["hit@1"] == 1 and totals["covisitation"]["hit@1"] == 2
    assert totals["popularity"]["session_recall"] == totals["covisitation"]["session_recall"] == 2


def test_the_scored_share_is_a_share_and_repeats() -> None:
    names = [f"user{i}:{i * 1000}" for i in range(4000)]
    chosen = [name for name in names if is_scored(name, 0.25)]
    assert 0.2 < len(chosen) / len(names) < 0.3
    assert all(is_scored(name, 0.5) for name in chosen)
    assert all(is_scored(name, 1.0) for name in names) and not any(is_scored(name, 0.0) for name in names)


def tiny_scorer(item_codes: np.ndarray, beams: int = 4) -> ModelScorer:
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, heads=2, encoder_layers=1, decoder_layers=1, d_ff=16, experts=2, codes=4, levels=2,
                         session_items=3)
    return ModelScorer(OneRec(config).eval(), item_codes, beams=beams)


def test_items_of_one_semantic_id_stand_together_in_catalogue_order() -> None:
    codes = np.array([[0, 0], [1, 1], [0, 0], [2, 3], [0, 0]], np.int32)
    [[ranked], _] = tiny_scorer(codes).search([example([1], [0])])
    assert sorted(ranked) == [0, 1, 2, 3, 4]
    place = ranked.index(0)
    assert ranked[place : place + 3] == [0, 2, 4]


def test_generated_sessions_hold_no_item_twice_and_are_best_first() -> None:
    codes = np.array([[i // 4, i % 4] for i in range(16)] + [[0, 0], [3, 3]], np.int32)
    scorer = tiny_scorer(codes, beams=12)
    for sessions in scorer.search([example([1, 2], [0]), example([], [3])])[1]:
        assert sessions.shape == (12, 3)
        assert all(len(set(session)) == 3 for session in sessions.tolist())


def test_the_ranking_is_that_of_a_search_for_one_item() -> None:
    from exporter.trie import build_trie
    from trainer.beam import beam_search, trie_tensors

    codes = np.array([[i // 4, i % 4] for i in range(16)], np.int32)
    scorer = tiny_scorer(codes, beams=16)
    ranked = scorer.search([example([1, 2], [0])])[0]
    trie = build_trie(codes, 4)
    history = torch.from_numpy(codes[[1, 2]]).long().unsqueeze(0)
    found = beam_search(scorer._model, trie_tensors(trie), history, torch.ones(1, 2, dtype=torch.bool), width=16,
                        items=1)
    assert ranked == [found.leaves[0, :10, 0].tolist()]


def test_a_catalogue_smaller_than_a_session_scores_nothing_instead_of_failing() -> None:
    scores = tiny_scorer(np.array([[0, 1], [2, 2]], np.int32)).score([example([], [0, 1])])
    assert scores["session_recall"] == scores["best_recall"] == 0
    assert scores["hit@5"] == 1


def test_metrics_add_up_over_lines(tmp_path: Path) -> None:
    lines = [line(1, scored=2), line(2, scored=6, loss=3.0, codes=30), line(3, scored=0, loss=None, scores={})]
    windows, found = means(lines)
    assert windows == 8 and found == {"onerec": {"hit@1": 0.5}}
    assert mean_loss(lines) == pytest.approx((10 + 90) / 40)
    assert mean_loss([]) is None


def test_bins_are_consecutive_even_and_complete() -> None:
    lines = [line(i) for i in range(100)]
    groups = bins(lines, 7)
    assert [x for group in groups for x in group] == lines
    assert len(groups) == 7 and all(13 <= len(group) <= 16 for group in groups)


def test_a_line_being_written_is_left_out(tmp_path: Path) -> None:
    import msgspec

    path = tmp_path / "metrics.jsonl"
    path.write_bytes(msgspec.json.encode(line(1)) + b"\n" + msgspec.json.encode(line(2))[:20])
    assert read_metrics(path) == [line(1)]
    assert read_metrics(tmp_path / "none") == []
