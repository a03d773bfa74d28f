"""The trie accepts all and only the catalogue, for any number of levels and codes."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.trie import Trie, array_names, build_trie
from onerec.errors import UserError


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    levels, codes = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rows = draw(st.lists(st.tuples(*[st.integers(0, codes - 1)] * levels), min_size=1, max_size=30))
    return np.array(rows, dtype=np.int32).reshape(len(rows), levels), codes


def walk(arrays: dict[str, np.ndarray], levels: int) -> dict[tuple[int, ...], int]:
    """Every path from the root to a leaf, walked over the graph's own inputs: tuple -> number of the leaf."""
    paths = {(int(token),): int(token) for token in np.flatnonzero(arrays["capacity0"])}
    for level in range(1, levels):
        pointers, tokens = arrays[f"pointers{level}"], arrays[f"tokens{level}"]
        paths = {
            (*prefix, int(tokens[child])): child
            for prefix, node in paths.items()
            for child in range(pointers[node], pointers[node + 1])
        }
    return {path: int(arrays["leaf0"][node]) for path, node in paths.items()} if levels == 1 else paths


@given(catalogues())
def test_every_legal_path_is_an_item_and_every_item_a_path(catalogue: tuple[np.ndarray, int]) -> None:
    codes, size = catalogue
    trie = build_trie(codes, size)
    paths = walk(trie.arrays(), trie.levels)
    assert sorted(paths) == sorted({tuple(row) for row in codes.tolist()})
    for path, leaf in paths.items():
        assert trie.tuples[leaf].tolist() == list(path)
        assert trie.leaf_items(leaf).tolist() == [row for row, tup in enumerate(codes.tolist()) if tuple(tup) == path]


@given(catalogues())
def test_lookup_accepts_all_and_only_the_catalogue(catalogue: tuple[np.ndarray, int]) -> None:
    codes, size = catalogue
    trie = build_trie(codes, size)
    assert (trie.tuples[trie.lookup(codes)] == codes).all()
    some = np.array(list(itertools.islice(itertools.product(range(-1, size + 1), repeat=trie.levels), 2000)))
    known = {tuple(row) for row in codes.tolist()}
    assert (trie.lookup(some) >= 0).tolist() == [tuple(row) in known for row in some.tolist()]


@given(catalogues())
def test_capacity_and_ancestors_agree_with_the_items_below_each_node(catalogue: tuple[np.ndarray, int]) -> None:
    codes, size = catalogue
    trie = build_trie(codes, size)
    arrays = trie.arrays()
    for level in range(trie.levels):
        capacity = arrays[f"capacity{level}"]
        assert capacity.sum() == len(codes)
        for leaf, row in enumerate(trie.tuples):
            below = (codes[:, : level + 1] == row[: level + 1]).all(axis=1).sum()
            assert capacity[trie.ancestor[level][leaf]] == below
            if level > 0:
                assert trie.tokens[level][trie.ancestor[level][leaf]] == row[level]
                assert len(arrays[f"slots{level}"]) == np.diff(arrays[f"pointers{level}"]).max()


@given(catalogues())
def test_codes_too_wide_to_pack_are_sorted_the_same_way(catalogue: tuple[np.ndarray, int]) -> None:
    codes, size = catalogue
    spread = np.concatenate([codes, np.zeros((len(codes), 62), codes.dtype)], axis=1)  # 64 levels fit no int64
    narrow, wide = build_trie(codes, size), build_trie(spread, max(size, 2))
    assert wide.leaf_rows.tolist() == narrow.leaf_rows.tolist()
    assert wide.leaf_pointers.tolist() == narrow.leaf_pointers.tolist()


def test_a_repeated_leaf_stands_for_the_next_item_of_its_list() -> None:
    trie = build_trie(np.array([[1, 1], [0, 1], [1, 1], [1, 1]]), codes=2)
    assert trie.session_rows(np.array([[1, 0, 1, 1], [0, 1, 1, 1]])).tolist() == [[0, 1, 2, 3], [1, 0, 2, 3]]
    for too_much in ([[0, 0]], [[-1, 0]], [[1, 1, 1, 1]]):
        with pytest.raises(IndexError, match="dead beam"):
            trie.session_rows(np.array(too_much))


def test_single_level_leaves_skip_unused_codes() -> None:
    trie = build_trie(np.array([[7], [2], [7]]), codes=9)
    assert trie.tuples.ravel().tolist() == [2, 7]
    assert trie.session_rows(np.array([1, 0, 1])).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.empty((0, 3), int), "no items"),
        (np.array([[0, 8]]), "0 to 7"),
        (np.array([[-1, 0]]), "0 to 7"),
        (np.zeros(3, int), "shape"),
    ],
)
def test_a_catalogue_that_cannot_be_served_is_refused(codes: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_trie(codes, codes=8)


@given(catalogues())
def test_arrays_are_contiguous_and_named_in_order(catalogue: tuple[np.ndarray, int]) -> None:
    codes, size = catalogue
    arrays = build_trie(codes, size).arrays()
    assert list(arrays) == array_names(codes.shape[1])
    assert all(array.flags.c_contiguous and array.dtype == np.int32 for array in arrays.values())


def test_a_million_items_are_built_in_a_fraction_of_a_second() -> None:
    codes = np.random.default_rng(0).integers(0, 8192, (1_000_000, 3), dtype=np.int32)

    def seconds() -> tuple[float, Trie]:
        begin = time.perf_counter()
        trie = build_trie(codes, 8192)
        trie.arrays()
        return time.perf_counter() - begin, trie

    best, trie = min((seconds() for _ in range(3)), key=lambda pair: pair[0])
    assert trie.items == 1_000_000
    assert best < 1.0
