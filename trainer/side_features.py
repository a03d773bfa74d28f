"""From what is known of an item without anybody's behaviour (tags, author, duration) to its vector: one linear map."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

MAX_FEATURES = 2048
"""The map is solved in closed form, which is cubic in this; the most frequent features are kept."""
RIDGE = 1.0


def features_of(tags: Sequence[str], author_id: str | None, duration_ms: int | None) -> list[str]:
    """Names of the features that an item has; empty where nothing is known of it. Duration by powers of two."""
    names = [f"tag:{tag}" for tag in tags]
    if author_id:
        names.append(f"author:{author_id}")
    if duration_ms:
        names.append(f"duration:{int(duration_ms).bit_length()}")
    return names


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SideModel:
    """vector = bias + sum of the weights of the item's features; `weights` float32 [F + 1, d], the bias last."""

    vocabulary: dict[str, int]
    weights: NDArray[np.float32]

    def vector(self, names: Sequence[str]) -> NDArray[np.float32]:
        """The vector [d] of an item with these features; those never seen count as absent."""
        rows = sorted({self.vocabulary[name] for name in names if name in self.vocabulary})
        return self.weights[[*rows, len(self.weights) - 1]].sum(axis=0, dtype=np.float32)


def design(vocabulary: dict[str, int], features: Sequence[Sequence[str]]) -> sparse.csr_matrix:
    """Ones where an item has a feature, float64 [N, F + 1]; the last column is the bias."""
    rows, columns = [], []
    for row, names in enumerate(features):
        found = {vocabulary[name] for name in names if name in vocabulary}
        columns.extend([*sorted(found), len(vocabulary)])
        rows.extend([row] * (len(found) + 1))
    shape = (len(features), len(vocabulary) + 1)
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)


def build_vocabulary(features: Sequence[Sequence[str]]) -> dict[str, int]:
    """The most frequent features, at most `MAX_FEATURES`; one that a single item has says nothing of others."""
    counts = Counter(name for names in features for name in set(names))
    kept = sorted((name for name, count in counts.items() if count > 1), key=lambda name: (-counts[name], name))
    return {name: place for place, name in enumerate(kept[:MAX_FEATURES])}


def fit_side_model(
    features: Sequence[Sequence[str]], vectors_Nd: NDArray[np.floating], weights_N: NDArray[np.floating]
) -> SideModel:
    """Ridge regression from features to vectors, item i counting `weights_N[i]` times; the bias is not shrunk."""
    vocabulary = build_vocabulary(features)
    design_NF = design(vocabulary, features)
    weighted = design_NF.multiply(np.asarray(weights_N, np.float64)[:, None]).tocsr()
    gram = (design_NF.T @ weighted).toarray()
    penalty = np.full(len(gram), RIDGE)
    penalty[-1] = 1e-9
    gram[np.diag_indices_from(gram)] += penalty
    solution = linalg.solve(gram, weighted.T @ np.asarray(vectors_Nd, np.float64), assume_a="pos")
    return SideModel(vocabulary=vocabulary, weights=solution.astype(np.float32))


def side_only_model(features: Sequence[Sequence[str]], dimension: int, seed: int) -> SideModel:
    """Where nobody has watched anything yet: the leading directions of the centred features themselves.

    Features that few items share weigh more (inverse frequency), else every item would look like the commonest tag.
    """
    from sklearn.utils.extmath import randomized_svd

    vocabulary = build_vocabulary(features) or {name: place for place, name in enumerate(
        sorted({name for names in features for name in names})[:MAX_FEATURES])}
    ones = design(vocabulary, features)[:, :-1]
    idf = np.log1p(len(features) / np.maximum(1.0, np.asarray(ones.sum(axis=0)).ravel()))
    rank = min(dimension, *ones.shape)
    _, _, directions = randomized_svd(ones.multiply(idf).tocsr(), rank, random_state=seed)
    weights = np.zeros((len(vocabulary) + 1, dimension))
    weights[:-1, :rank] = idf[:, None] * directions.T
    weights[-1] = -np.asarray(ones.mean(axis=0)).ravel() @ weights[:-1]
    return SideModel(vocabulary=vocabulary, weights=weights.astype(np.float32))
