"""Balanced residual k-means: exactly even loads, the naive loop's assignment, stability, nearest codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import semantic_ids
from trainer.codebook_report import compare, measure, plot
from trainer.config import CatalogueConfig
from trainer.semantic_ids import (
    METHODS,
    assign_deferred,
    assign_greedy,
    assign_naive,
    assign_plain,
    balanced_loads,
    codebook_of_codes,
    default_codes,
    fit,
    fit_level,
    nearest_codes,
)


def clustered(items: int, dimension: int = 8, seed: int = 0) -> np.ndarray:
    """Vectors around a few centres of very different sizes, as real catalogues are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, dimension))
    return centres[np.minimum(rng.geometric(0.3, items) - 1, 11)] + 0.4 * rng.normal(size=(items, dimension))


def duplicated(items: int, dimension: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(max(1, items // 5), dimension))[rng.integers(0, max(1, items // 5), items)]


@pytest.mark.parametrize("method", ["greedy", "deferred"])
@settings(max_examples=40, deadline=None)
@given(items=st.integers(1, 200), codes=st.integers(1, 64), duplicates=st.booleans(), seed=st.integers(0, 99))
def test_every_code_of_every_level_is_equally_full(method, items, codes, duplicates, seed):
    vectors = duplicated(items, 3, seed) if duplicates else clustered(items, 3, seed)
    book = fit(vectors, levels=3, codes=codes, method=method, iterations=4, rng=np.random.default_rng(seed))
    for level in book.codes.T:
        loads = np.bincount(level, minlength=codes)
        assert set(loads) <= {items // codes, -(-items // codes)}
        assert loads.sum() == items


@settings(max_examples=60, deadline=None)
@given(items=st.integers(1, 400), codes=st.integers(1, 50), duplicates=st.booleans(), seed=st.integers(0, 9999))
def test_the_gemm_form_gives_the_assignment_of_the_loop_of_algorithm_1(items, codes, duplicates, seed):
    points = duplicated(items, 5, seed) if duplicates else clustered(items, 5, seed)
    centroids = np.random.default_rng(seed + 1).normal(size=(codes, 5))
    loads = balanced_loads(items, codes)
    assert np.array_equal(assign_naive(points, centroids, loads), assign_greedy(points, centroids, loads))


def test_the_gemm_form_equals_the_loop_through_all_iterations_where_it_guesses_from_samples():
    points = clustered(6000, 16)
    fits = [fit_level(points, 24, assign=assign, iterations=5, rng=np.random.default_rng(3))
            for assign in (assign_naive, assign_greedy)]
    assert np.array_equal(fits[0][1], fits[1][1])
    assert np.array_equal(fits[0][0], fits[1][0])


def test_ties_on_a_grid_go_to_the_smaller_row_in_both_forms():
    grid = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), axis=-1).reshape(-1, 2)
    loads = balanced_loads(400, 16)
    assert np.array_equal(assign_naive(grid, grid[:16], loads), assign_greedy(grid, grid[:16], loads))


@settings(max_examples=40, deadline=None)
@given(items=st.integers(1, 120), codes=st.integers(1, 30), duplicates=st.booleans(), seed=st.integers(0, 9999))
def test_deferred_acceptance_leaves_no_pair_that_would_rather_have_each_other(items, codes, duplicates, seed):
    points = duplicated(items, 4, seed) if duplicates else clustered(items, 4, seed)
    centroids = np.random.default_rng(seed + 1).normal(size=(codes, 4))
    loads = balanced_loads(items, codes)
    held = assign_deferred(points, centroids, loads)
    assert np.array_equal(np.bincount(held, minlength=codes), loads)
    distances = ((points[:, None] - centroids) ** 2).sum(axis=2)
    own = distances[np.arange(items), held]
    worst = np.array([own[held == code].max() if loads[code] else -np.inf for code in range(codes)])
    blocking = (distances < own[:, None] - 1e-9) & (distances < worst - 1e-9)
    assert not blocking.any()


def test_deferred_acceptance_is_the_same_when_distances_do_not_fit_into_memory(monkeypatch):
    points, centroids, loads = clustered(500, 8), clustered(20, 8, 1), balanced_loads(500, 20)
    at_once = assign_deferred(points, centroids, loads)
    plain = assign_plain(points, centroids, loads)
    greedy = assign_greedy(points, centroids, loads)
    monkeypatch.setattr(semantic_ids, "BLOCK_CELLS", 700)
    assert np.array_equal(assign_deferred(points, centroids, loads), at_once)
    assert np.array_equal(assign_plain(points, centroids, loads), plain)
    assert np.array_equal(assign_greedy(points, centroids, loads), greedy)


def test_deferred_acceptance_leaves_less_error_than_the_greedy_pass_and_plain_least():
    left = {method: fit(clustered(3000, 16), levels=1, codes=32, method=method, iterations=15,
                        rng=np.random.default_rng(0)).errors[-1] for method in METHODS}
    assert left["plain"] < left["deferred"] < left["greedy"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(method):
    def once(seed: int) -> bytes:
        book = fit(clustered(300), levels=3, codes=16, method=method, iterations=5, rng=np.random.default_rng(seed))
        return book.centroids.tobytes() + book.codes.tobytes()

    assert once(1) == once(1)
    assert once(1) != once(2)


@pytest.mark.parametrize("method", METHODS)
def test_each_level_leaves_less_error_and_the_residuals_are_what_the_centroids_leave(method):
    vectors = clustered(400)
    book = fit(vectors, levels=3, codes=16, method=method, iterations=8, rng=np.random.default_rng(0))
    assert book.errors == sorted(book.errors, reverse=True)
    rebuilt = sum(book.centroids[level][book.codes[:, level]] for level in range(3))
    assert np.isclose(((vectors - rebuilt) ** 2).sum(axis=1).mean(), book.errors[-1], rtol=1e-5)


def test_centroids_are_the_means_of_their_items():
    points = clustered(200)
    centroids, assignment = fit_level(points, 10, assign=assign_greedy, iterations=3, rng=np.random.default_rng(0))
    for code in range(10):
        assert np.allclose(centroids[code], points[assignment == code].mean(axis=0))


@pytest.mark.parametrize("method", METHODS)
def test_one_item_and_equal_items_get_codes_that_exist(method):
    for vectors in (np.ones((1, 4)), np.ones((7, 4))):
        book = fit(vectors, levels=3, codes=4, method=method, iterations=5, rng=np.random.default_rng(0))
        assert book.codes.shape == (len(vectors), 3)
        assert 0 <= book.codes.min() and book.codes.max() < 4
        assert book.used[np.arange(3), book.codes].all()


@settings(max_examples=30, deadline=None)
@given(items=st.integers(1, 60), codes=st.integers(1, 40), seed=st.integers(0, 99))
def test_nearest_codes_are_the_nearest_used_centroids_level_by_level(items, codes, seed):
    book = fit(clustered(items, 4, seed), levels=3, codes=codes, method="deferred", iterations=3,
               rng=np.random.default_rng(seed))
    for vector in clustered(5, 4, seed + 1):
        found = nearest_codes(vector[None], book.centroids, book.used)[0]
        residual = vector.astype(np.float64)
        for level, code in enumerate(found):
            assert book.used[level, code]
            distances = ((residual - book.centroids[level].astype(np.float64)) ** 2).sum(axis=1)
            assert distances[code] <= distances[book.used[level]].min() + 1e-9
            residual = residual - book.centroids[level][code]


def test_codes_of_a_new_item_do_not_depend_on_what_came_with_it():
    book = fit(clustered(300), levels=3, codes=16, method="deferred", iterations=5, rng=np.random.default_rng(0))
    many = clustered(50, seed=9)
    together = nearest_codes(many, book.centroids, book.used)
    alone = np.concatenate([nearest_codes(vector[None], book.centroids, book.used) for vector in many])
    assert np.array_equal(together, alone)


def test_codes_made_elsewhere_imply_the_centroids_they_came_from():
    book = fit(clustered(300), levels=2, codes=16, method="deferred", iterations=40, rng=np.random.default_rng(0))
    again = codebook_of_codes(clustered(300), book.codes, 16)
    assert np.allclose(again.centroids, book.centroids, atol=1e-5)
    assert np.allclose(again.errors, book.errors)


def test_the_default_number_of_codes_grows_with_the_catalogue_to_the_papers():
    assert [default_codes(n) for n in (1, 300, 7583, 10_000, 12_101, 10**7, 10**9)] == [2, 32, 256, 256, 256, 8192, 8192]


def test_quality_counts_loads_and_shared_tuples():
    codes = np.array([[0, 1], [0, 1], [0, 0], [2, 1], [2, 1], [2, 1]], np.int32)
    fitted = np.array([True, True, True, True, True, False])
    quality = measure(codes, fitted, 4, vectors_nd=None, errors=None)
    assert (quality.load_min, quality.load_max) == ([0, 0], [3, 4])
    assert (quality.distinct, quality.shared, quality.sharing, quality.longest) == (3, 2, 5, 3)
    assert quality.used_codes == [2, 2]
    assert quality.errors is None and quality.neighbours is None
    assert quality.chance == pytest.approx([12 / 30, 8 / 30])


def test_neighbours_of_tight_clusters_share_their_codes_and_strangers_do_not():
    rng = np.random.default_rng(0)
    centres = np.eye(8) * 10
    vectors = (centres[np.arange(400) % 8] + 0.01 * rng.normal(size=(400, 8))).astype(np.float32)
    codes = (np.arange(400) % 8)[:, None].astype(np.int32)
    quality = measure(codes, np.ones(400, bool), 8, vectors_nd=vectors, errors=None)
    assert quality.neighbours == [1.0]
    assert quality.chance[0] < 0.13
    assert quality.entropy == pytest.approx([1.0])


def test_the_comparison_shows_that_only_plain_k_means_is_uneven(tmp_path):
    qualities = compare(clustered(600).astype(np.float32), levels=3, codes=16,
                        settings=CatalogueConfig(iterations=5))
    assert list(qualities) == ["greedy", "deferred", "plain"]
    for name in ("greedy", "deferred"):
        assert qualities[name].load_min == [37] * 3 and qualities[name].load_max == [38] * 3
    assert qualities["plain"].load_max[0] > 60
    plot(qualities, tmp_path / "codebook.png")
    assert (tmp_path / "codebook.png").read_bytes().startswith(b"\x89PNG")
