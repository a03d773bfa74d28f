"""The beam search: exact where it is wide enough, only legal and distinct items, independent of batch and padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporter.trie import Trie, build_trie
from trainer.beam import SENTINEL, Beams, beam_search, free_search, top, trie_tensors
from trainer.config import ModelConfig
from trainer.model import OneRec

CODES = 6


def make_model(levels: int, items: int, seed: int = 0, **changes: object) -> OneRec:
    """A tiny model with sharp, distinct predictions: heads as they are drawn would leave all sessions nearly equal."""
    config = ModelConfig(
        **{
            "d_model": 16, "heads": 2, "d_ff": 24, "experts": 3, "encoder_layers": 1, "decoder_layers": 2,
            "codes": CODES, "levels": levels, "session_items": items, **changes,
        }  # type: ignore[arg-type]
    )  # fmt: skip
    model = OneRec(config)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for head in model.level_head:
            head.mul_(20)
        for bias in (model.encoder_bias, model.decoder_bias):
            bias.table.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def histories(levels: int, lengths: list[int], seed: int = 0, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Random histories, right-padded with random codes that nothing may read."""
    random = np.random.default_rng(seed)
    rows = [random.integers(0, CODES, (length, levels)) for length in lengths]
    codes = np.random.default_rng(99).integers(0, CODES, (len(rows), max(1, *lengths) + padding, levels))
    for index, row in enumerate(rows):
        codes[index, : len(row)] = row
    mask = torch.arange(codes.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return torch.from_numpy(codes), mask


def brute_force(model: OneRec, trie: Trie, history: Tensor, mask: Tensor, items: int) -> dict[tuple[int, ...], float]:
    """Every session that uses each leaf at most as often as it has items, with its log-probability."""
    held = np.diff(trie.leaf_pointers)
    sessions = [
        session
        for session in itertools.product(range(trie.leaves), repeat=items)
        if all(session.count(leaf) <= held[leaf] for leaf in session)
    ]
    targets = torch.from_numpy(trie.tuples[np.array(sessions)].astype(np.int64))
    many = len(sessions)
    with torch.no_grad():
        scores = model.session_log_prob(
            history.expand(many, -1, -1), mask.expand(many, -1), targets, torch.ones(many, items, dtype=torch.bool)
        )
    return dict(zip(sessions, scores.tolist(), strict=True))


def assert_same(one: Beams, other: Beams) -> None:
    assert torch.equal(one.leaves, other.leaves)
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    items=st.integers(1, 2),
    rows=st.integers(1, 3).flatmap(
        lambda levels: st.lists(st.tuples(*[st.integers(0, CODES - 1)] * levels), min_size=1, max_size=9)
    ),
    length=st.integers(0, 4),
    seed=st.integers(0, 50),
)
def test_a_beam_as_wide_as_the_catalogue_is_exact_ranking(
    items: int, rows: list[tuple[int, ...]], length: int, seed: int
) -> None:
    trie = build_trie(np.array(rows), CODES)
    model = make_model(trie.levels, items, seed)
    history, mask = histories(trie.levels, [length], seed)
    expected = brute_force(model, trie, history, mask, items) if len(rows) >= items else {}
    beams = beam_search(model, trie_tensors(trie), history, mask, width=trie.leaves**items + 2)
    found = {
        tuple(leaves): score
        for leaves, score in zip(beams.leaves[beams.alive].tolist(), beams.scores[beams.alive].tolist(), strict=True)
    }
    assert int(beams.alive.sum()) == len(found)
    assert found.keys() == expected.keys()
    assert all(abs(found[session] - score) < 1e-4 for session, score in expected.items())
    assert (beams.scores[:, 1:] <= beams.scores[:, :-1]).all()


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("history_tokens", ["item", "code"])
def test_scores_are_the_log_probabilities_of_the_sessions(levels: int, history_tokens: str) -> None:
    model = make_model(levels, items=4, history_tokens=history_tokens)
    trie = build_trie(np.random.default_rng(1).integers(0, CODES, (40, levels)), CODES)
    history, mask = histories(levels, [3, 0, 5])
    beams = beam_search(model, trie_tensors(trie), history, mask, width=8)
    assert beams.alive.all()
    for user in range(3):
        targets = torch.from_numpy(trie.tuples[beams.leaves[user].numpy()].astype(np.int64))
        with torch.no_grad():
            expected = model.session_log_prob(
                history[user].expand(8, -1, -1), mask[user].expand(8, -1), targets, torch.ones(8, 4, dtype=torch.bool)
            )
        torch.testing.assert_close(beams.scores[user], expected, rtol=0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=3, max_size=25), seed=st.integers(0, 50))
def test_no_item_twice_and_none_outside_the_catalogue(rows: list[tuple[int, ...]], seed: int) -> None:
    trie = build_trie(np.array(rows), CODES)
    history, mask = histories(3, [2, 5], seed)
    beams = beam_search(make_model(3, 3, seed), trie_tensors(trie), history, mask, width=16)
    sessions = beams.leaves[beams.alive].numpy()
    assert len(sessions) > 0
    for items in trie.session_rows(sessions):  # refuses a leaf used more often than it has items
        assert len(set(items.tolist())) == 3
    assert (beams.leaves[~beams.alive] == -1).all()
    assert (beams.scores[~beams.alive] == SENTINEL).all()
    assert torch.finfo(torch.float16).min < SENTINEL


def test_one_item_of_several_at_a_triple_may_follow_another() -> None:
    trie = build_trie(np.array([[1, 1, 1]] * 3), CODES)
    history, mask = histories(3, [2])
    beams = beam_search(make_model(3, 3), trie_tensors(trie), history, mask, width=4)
    assert beams.leaves[beams.alive].tolist() == [[0, 0, 0]]


def test_fewer_items_than_a_session_needs_leaves_no_beam_alive() -> None:
    trie = build_trie(np.array([[1, 1, 1], [1, 1, 1]]), CODES)
    history, mask = histories(3, [2, 0])
    beams = beam_search(make_model(3, 3), trie_tensors(trie), history, mask, width=4)
    assert not beams.alive.any()
    assert (beams.leaves == -1).all()


def test_a_batch_gives_what_each_history_gives_alone_whatever_the_padding() -> None:
    model, lengths = make_model(3, items=3), [4, 0, 1, 7]
    trie = trie_tensors(build_trie(np.random.default_rng(2).integers(0, CODES, (60, 3)), CODES))
    together = beam_search(model, trie, *histories(3, lengths), width=12)
    assert_same(together, beam_search(model, trie, *histories(3, lengths, padding=9), width=12))
    history, mask = histories(3, lengths)
    for user, length in enumerate(lengths):
        cut = max(1, length)
        alone = beam_search(model, trie, history[user : user + 1, :cut], mask[user : user + 1, :cut], width=12)
        assert_same(alone, Beams(together.leaves[user : user + 1], together.scores[user : user + 1]))


def test_equal_scores_go_to_the_lower_beam_and_code() -> None:
    model = make_model(2, items=2)
    with torch.no_grad():
        for head in model.level_head:
            head.zero_()
    trie = build_trie(np.array([[a, b] for a in range(4) for b in range(2)]), CODES)
    beams = beam_search(model, trie_tensors(trie), *histories(2, [3]), width=5)
    assert beams.leaves[0].tolist() == [[0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 12))
def test_the_selection_is_stable(values: list[int], width: int) -> None:
    width = min(width, len(values))
    found, indices = top(torch.tensor([values], dtype=torch.float32), width)
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))[:width]
    assert indices.tolist() == [order]
    assert found.tolist() == [[values[index] for index in order]]


def test_without_a_trie_most_sessions_name_no_item_and_scores_are_no_lower() -> None:
    model = make_model(3, items=3)
    trie = build_trie(np.random.default_rng(3).integers(0, CODES, (10, 3)), CODES)
    history, mask = histories(3, [4])
    free = free_search(model, history, mask, width=CODES**3)
    assert (trie.lookup(free.codes.numpy()) < 0).any()
    assert free.scores.max() >= beam_search(model, trie_tensors(trie), history, mask, width=CODES**3).scores.max()
