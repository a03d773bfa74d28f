"""Semantic IDs: residual k-means whose codes are all equally full (paper §3.1, Algorithm 1).

Shape suffixes: N items, K codes of a level, L levels, d dimension. Pure NumPy: no files, no store, no configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Method = Literal["greedy", "deferred", "plain"]
METHODS: tuple[Method, ...] = ("greedy", "deferred", "plain")

BLOCK_CELLS = 1 << 25
"""Distances held at once: 256 MB of float64, whatever N and K are."""
SAMPLE = 1024
"""Distances looked at to guess how far the w nearest points reach."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Codebook:
    """What a fit gives.

    `centroids` float32 [L, K, d]; `codes` int32 [N, L]; `used` bool [L, K], the codes that hold an item (all of them
    where N >= K); `errors` [L + 1], the mean squared norm of the residual before the first and after every level.
    """

    centroids: NDArray[np.float32]
    codes: NDArray[np.int32]
    used: NDArray[np.bool_]
    errors: list[float]


def default_codes(items: int) -> int:
    """K for a catalogue: the power of two nearest to 2.2 √N (300 items: 32; 10,000: 256), at most the paper's 8192.

    So two levels already tell a few times as many places as there are items, and a code has items enough to learn from.
    """
    return min(8192, 1 << round(np.log2(2.2 * max(items, 1) ** 0.5)))


def balanced_loads(items: int, codes: int) -> Rows:
    """How many items each code gets, int64 [K]: ⌈N/K⌉ for the first N mod K codes, ⌊N/K⌋ for the others."""
    loads = np.full(codes, items // codes, np.int64)
    loads[: items % codes] += 1
    return loads


def assign_naive(points_Nd: Floats, centroids_Kd: Floats, loads_K: Rows) -> Rows:
    """Lines 4-10 of Algorithm 1 as written: every cluster in turn sorts who is left; ties go to the smaller row.

    Returns the cluster of every point, int64 [N]. The reference for `assign_greedy`; 17 times slower.
    """
    assignment = np.empty(len(points_Nd), np.int64)
    left = np.arange(len(points_Nd))
    for cluster, load in enumerate(loads_K):
        distances = ((points_Nd[left] - centroids_Kd[cluster]) ** 2).sum(axis=1)
        order = np.argsort(distances, kind="stable")
        assignment[left[order[:load]]] = cluster
        left = np.sort(left[order[load:]])
    return assignment


def assign_greedy(points_Nd: Floats, centroids_Kd: Floats, loads_K: Rows) -> Rows:
    """The assignment of `assign_naive` from distance GEMMs over blocks of clusters and the points still free.

    Within an iteration no cluster looks at another's updated centroid, so all distances are known beforehand.
    """
    assignment = np.empty(len(points_Nd), np.int64)
    left = np.arange(len(points_Nd))
    unique_Ud, group_N = _distinct(points_Nd)
    codes = len(centroids_Kd)
    start = 0
    while start < codes and len(left):
        stop = min(codes, start + max(1, min(-(-codes // 8), BLOCK_CELLS // len(left))))
        if group_N is None:
            near_BF = _comparable(points_Nd[left], centroids_Kd[start:stop])
        else:
            near_BF = _comparable(unique_Ud, centroids_Kd[start:stop])[:, group_N[left]]
        free = np.ones(len(left), bool)
        for row, load in zip(near_BF, loads_K[start:stop], strict=True):
            chosen = _nearest_free(row, free, int(load))
            assignment[left[chosen]] = start
            free[chosen] = False
            start += 1
        left = left[free]
    return assignment


def assign_deferred(points_Nd: Floats, centroids_Kd: Floats, loads_K: Rows) -> Rows:
    """Deferred acceptance: points propose to their nearest cluster that may take them, full clusters keep the nearest.

    The result is the one stable matching that is best for the points (Gale and Shapley), whatever the order of the
    proposals; ties go to the smaller row and the smaller code. Returns int64 [N], loads as given.
    """
    items, codes = len(points_Nd), len(centroids_Kd)
    distances = _Distances(points_Nd, centroids_Kd)
    worst = np.where(loads_K > 0, np.inf, -np.inf)
    worst_row = np.full(codes, items, np.int64)
    holder, held = distances.nearest(loads_K == 0)
    single = np.arange(items)
    while len(single):
        asked = np.zeros(codes, bool)
        asked[holder[single]] = True
        members = np.flatnonzero(asked[holder])
        members = members[np.lexsort((members, held[members], holder[members]))]
        cluster = holder[members]
        first = np.searchsorted(cluster, cluster, side="left")
        rank = np.arange(len(members)) - first
        single = members[rank >= loads_K[cluster]]
        last = members[rank == loads_K[cluster] - 1]
        worst[holder[last]] = held[last]
        worst_row[holder[last]] = last
        holder[single] = -1
        for rows in _portions(single, codes):
            near = distances.rows(rows)
            open_to = near < worst
            tie = near == worst
            if tie.any():
                open_to |= tie & (rows[:, None] < worst_row)
            near[~open_to] = np.inf
            holder[rows] = near.argmin(axis=1)
            held[rows] = near[np.arange(len(rows)), holder[rows]]
    return holder


def assign_plain(points_Nd: Floats, centroids_Kd: Floats, loads_K: Rows) -> Rows:
    """Lloyd's assignment: the nearest centroid, however full it is; `loads_K` only says which codes may be used."""
    return _Distances(points_Nd, centroids_Kd).nearest(loads_K == 0)[0]


ASSIGNMENTS: dict[Method, Callable[[Floats, Floats, Rows], Rows]] = {
    "greedy": assign_greedy,
    "deferred": assign_deferred,
    "plain": assign_plain,
}


def fit_level(
    points_Nd: Floats, codes: int, *, assign: Callable[[Floats, Floats, Rows], Rows], iterations: int,
    rng: np.random.Generator,
) -> tuple[Floats, Rows]:
    """One codebook (Algorithm 1): centroids [K, d] and assignment [N], until it repeats or for `iterations` rounds.

    A code without an item (N < K, or an abandoned one of plain k-means) keeps its first centroid.
    """
    items = len(points_Nd)
    loads_K = balanced_loads(items, codes)
    centroids_Kd = points_Nd[rng.choice(items, size=codes, replace=items < codes)].copy()
    assignment = np.full(items, -1, np.int64)
    for _ in range(iterations):
        before, assignment = assignment, assign(points_Nd, centroids_Kd, loads_K)
        centroids_Kd = centroid_means(points_Nd, assignment, centroids_Kd)
        if np.array_equal(before, assignment):
            break
    return centroids_Kd, assignment


def fit(
    vectors_Nd: NDArray[np.floating], *, levels: int, codes: int, method: Method, iterations: int,
    rng: np.random.Generator, progress: Callable[[int], None] = lambda level: None,
) -> Codebook:
    """Residual quantisation of N >= 1 finite vectors by `levels` codebooks of K codes; same `rng`, same bytes.

    `progress` hears of each level that is done. One BLAS thread, because sums depend on how they are split.
    """
    residual = np.asarray(vectors_Nd, np.float64).copy()
    items, dimension = residual.shape
    centroids_LKd = np.zeros((levels, codes, dimension), np.float32)
    codes_NL = np.empty((items, levels), np.int32)
    used_LK = np.zeros((levels, codes), bool)
    errors = [_mean_square(residual)]
    with threadpool_limits(limits=1):
        for level in range(levels):
            centroids, assignment = fit_level(
                residual, codes, assign=ASSIGNMENTS[method], iterations=iterations, rng=rng)
            centroids_LKd[level] = centroids
            codes_NL[:, level] = assignment
            used_LK[level, assignment] = True
            residual -= centroids_LKd[level].astype(np.float64)[assignment]
            errors.append(_mean_square(residual))
            progress(level)
    return Codebook(centroids=centroids_LKd, codes=codes_NL, used=used_LK, errors=errors)


def codebook_of_codes(vectors_Nd: NDArray[np.floating], codes_NL: NDArray[np.int32], codes: int) -> Codebook:
    """The centroids that codes made elsewhere imply: level by level the mean residual of the items of each code."""
    residual = np.asarray(vectors_Nd, np.float64).copy()
    levels = codes_NL.shape[1]
    centroids_LKd = np.zeros((levels, codes, residual.shape[1]), np.float32)
    used_LK = np.zeros((levels, codes), bool)
    errors = [_mean_square(residual)]
    for level in range(levels):
        assignment = codes_NL[:, level].astype(np.int64)
        used_LK[level, assignment] = True
        centroids_LKd[level] = centroid_means(residual, assignment, centroids_LKd[level].astype(np.float64))
        residual -= centroids_LKd[level].astype(np.float64)[assignment]
        errors.append(_mean_square(residual))
    return Codebook(centroids=centroids_LKd, codes=codes_NL, used=used_LK, errors=errors)


def nearest_codes(
    vectors_nd: NDArray[np.floating], centroids_LKd: NDArray[np.float32], used_LK: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Codes of items that were not fitted, int32 [n, L]: s^l = argmin_k ‖r^l − c_k^l‖² (paper §3.1).

    Item by item, so that an item's codes never depend on which others came with it; codes without items are not used.
    """
    found = np.empty((len(vectors_nd), len(centroids_LKd)), np.int32)
    centroids = centroids_LKd.astype(np.float64)
    norms_LK = np.where(used_LK, (centroids**2).sum(axis=2), np.inf)
    with threadpool_limits(limits=1):
        for row, vector in enumerate(vectors_nd):
            residual = np.array(vector, np.float64)
            for level, centroids_Kd in enumerate(centroids):
                code = int((norms_LK[level] - 2.0 * (centroids_Kd @ residual)).argmin())
                found[row, level] = code
                residual -= centroids_Kd[code]
    return found


def centroid_means(points_Nd: Floats, assignment: Rows, centroids_Kd: Floats) -> Floats:
    """Mean of the points of each cluster, [K, d]; a cluster without points keeps the centroid it had."""
    order = np.argsort(assignment, kind="stable")
    clusters, first, counts = np.unique(assignment[order], return_index=True, return_counts=True)
    means = centroids_Kd.copy()
    means[clusters] = np.add.reduceat(points_Nd[order], first, axis=0) / counts[:, None]
    return means


class _Distances:
    """Squared distances of points to all centroids, kept if they fit into `BLOCK_CELLS`, else computed again."""

    def __init__(self, points_Nd: Floats, centroids_Kd: Floats) -> None:
        self._points, self._centroids = points_Nd, centroids_Kd
        self._point_norms = (points_Nd**2).sum(axis=1)
        self._centroid_norms = (centroids_Kd**2).sum(axis=1)
        small = len(points_Nd) * len(centroids_Kd) <= BLOCK_CELLS
        self._all = self._compute(np.arange(len(points_Nd))) if small else None

    def nearest(self, closed_K: NDArray[np.bool_]) -> tuple[Rows, Floats]:
        """Every point's nearest cluster that is not closed, and how far it is, [N] each."""
        found = np.empty(len(self._points), np.int64)
        far = np.empty(len(self._points))
        for rows in _portions(np.arange(len(self._points)), len(self._centroids)):
            near = self._compute(rows) if self._all is None else self._all[rows[0] : rows[-1] + 1]
            if closed_K.any():
                near = np.where(closed_K, np.inf, near)
            found[rows] = near.argmin(axis=1)
            far[rows] = near[np.arange(len(rows)), found[rows]]
        return found, far

    def rows(self, rows: Rows) -> Floats:
        """[len(rows), K], the caller's to change."""
        return self._compute(rows) if self._all is None else self._all[rows]

    def _compute(self, rows: Rows) -> Floats:
        near = self._points[rows] @ self._centroids.T
        near *= -2.0
        near += self._point_norms[rows][:, None]
        near += self._centroid_norms
        return near


def _portions(rows: Rows, codes: int) -> list[Rows]:
    """Rows in portions whose distances fit into a quarter of `BLOCK_CELLS`."""
    return np.array_split(rows, max(1, -(-len(rows) * codes * 4 // BLOCK_CELLS))) if len(rows) else []


def _comparable(points_nd: Floats, centroids_Bd: Floats) -> Floats:
    """[B, n]: squared distances less ‖c‖², which is the same for all points of a cluster."""
    near = centroids_Bd @ points_nd.T
    near *= -2.0
    near += (points_nd**2).sum(axis=1)
    return near


def _nearest_free(near_F: Floats, free_F: NDArray[np.bool_], wanted: int) -> Rows:
    """The `wanted` free places with the smallest (distance, place).

    A guess from a sample of distances leaves about twice as many to sort; where it is too low, all free ones are.
    """
    if wanted == 0:
        return np.empty(0, np.int64)
    stride = max(1, len(near_F) // SAMPLE)
    sample = near_F[::stride][free_F[::stride]]
    reach = 2 * wanted // stride + 8
    places = np.empty(0, np.int64)
    if reach < len(sample):
        places = np.flatnonzero(near_F <= np.partition(sample, reach)[reach])
        places = places[free_F[places]]
    if len(places) < wanted:
        places = np.flatnonzero(free_F)
    return places[np.argsort(near_F[places], kind="stable")[:wanted]]


def _distinct(points_Nd: Floats) -> tuple[Floats, Rows | None]:
    """Distinct points and the place of each point among them, or None where all differ.

    BLAS may round equal rows differently at the edge of a block; equal points must be equally far from everything.
    """
    bits_Nd = np.ascontiguousarray(points_Nd + 0.0).view(np.uint64)
    odd_d = np.random.default_rng(0).integers(0, 1 << 63, points_Nd.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    if len(np.unique((bits_Nd ^ (bits_Nd >> np.uint64(32))) @ odd_d)) == len(points_Nd):
        return points_Nd, None
    flat = bits_Nd.view(np.dtype((np.void, bits_Nd.itemsize * bits_Nd.shape[1]))).ravel()
    _, first, group = np.unique(flat, return_index=True, return_inverse=True)
    return (points_Nd, None) if len(first) == len(points_Nd) else (points_Nd[first], group)


def _mean_square(residual_Nd: Floats) -> float:
    return float((residual_Nd**2).sum(axis=1).mean())
