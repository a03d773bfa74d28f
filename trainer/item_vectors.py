"""A vector for every item of the catalogue: given, from item events, or learnt from behaviour and side features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from onerec.errors import UserError
from trainer.behaviour import Behaviour, ItemSource, collect_behaviour, cooccurrence, factorise
from trainer.config import CatalogueConfig
from trainer.side_features import SideModel, features_of, fit_side_model, side_only_model
from trainer.vectors import VectorTable, check_vector

Space = Literal["given", "embedding", "learnt"]
TRUST = 5.0
"""Appearances from which on an item's own behaviour weighs more than what its tags and author promise."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ItemVectors:
    """Vectors of a catalogue, the most watched item first, ties by the bytes of the id.

    `vectors` float32 [N, d]; `tags` by row; `space` where they come from; `side` maps side features into the space;
    `origins` counts the rows by how they got their vector; `left_out`: items with nothing to make one from;
    `last_item`, `last_session`: sequence numbers up to which the state was used.
    """

    item_ids: list[str]
    vectors: NDArray[np.float32]
    tags: list[list[str]]
    space: Space
    side: SideModel
    origins: dict[str, int]
    left_out: list[str]
    last_item: int
    last_session: int


def make_vectors(
    source: ItemSource, config: CatalogueConfig, *, given: VectorTable | None, until: int | None,
    progress: Callable[[str], None],
) -> ItemVectors:
    """Vectors for all items that the state (up to event time `until`, ms) or `given` knows.

    Own vectors come first; what has none gets the mean of its neighbours in behaviour, else what its side features
    say. Raises UserError for a bad embedding and where no item has anything to go by.
    """
    progress("reading items")
    records, last_item = _records(source, until)
    progress("reading sessions and histories")
    behaviour = collect_behaviour(source, until, lambda count: progress(f"reading sessions and histories: {count:,}"))
    row_of = {item_id: row for row, item_id in enumerate(behaviour.item_ids)}
    known_ids = set(records) | set(row_of) | set(given.item_ids if given else ())
    if not known_ids:
        raise UserError("the state holds no items, sessions or histories (yet); run `onerec replay FILE --state DIR` "
                        "first, or name vectors with --vectors")
    counts = {item_id: float(behaviour.counts[row]) for item_id, row in row_of.items()}
    item_ids = sorted(known_ids, key=lambda item: (-counts.get(item, 0.0), item.encode()))
    features = [_features(records.get(item)) for item in item_ids]
    count_N = np.array([counts.get(item, 0.0) for item in item_ids])
    progress("learning vectors")
    together = _reordered(cooccurrence(behaviour), behaviour, item_ids)
    table = given or _embeddings(records)
    if table is None:
        vectors, origin, side = _learn(together, features, count_N, config)
    else:
        vectors, origin, side = _complete(table, item_ids, together, features, count_N)
    kept = np.flatnonzero(origin != "")
    if not len(kept):
        raise UserError(f"none of the {len(item_ids)} items has a vector, tags, an author, a duration or behaviour; "
                        "name vectors with --vectors, or send items with tags or embeddings")
    names, totals = np.unique(origin[kept], return_counts=True)
    return ItemVectors(
        item_ids=[item_ids[row] for row in kept],
        vectors=np.ascontiguousarray(vectors[kept]),
        tags=[list(records[item_ids[row]].tags) if item_ids[row] in records else [] for row in kept],
        space="learnt" if table is None else "given" if given else "embedding",
        side=side,
        origins=dict(zip(names.tolist(), totals.tolist(), strict=True)),
        left_out=[item_ids[row] for row in np.flatnonzero(origin == "")],
        last_item=last_item,
        last_session=behaviour.last_session,
    )


def to_unit(vectors_Nd: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length one; rows of zeros stay."""
    norms = np.linalg.norm(vectors_Nd, axis=-1, keepdims=True)
    return np.where(norms > 1e-9, vectors_Nd / np.maximum(norms, 1e-9), 0.0).astype(np.float32)


def _records(source: ItemSource, until: int | None) -> tuple[dict[str, Any], int]:
    """The newest entry of every item, and the last sequence number; with `until` none after it."""
    records: dict[str, Any] = {}
    last = 0
    for sequence, record in source.items(after=0):
        last = sequence
        if until is None or record.ts <= until:
            records[record.item_id] = record
    return records, last


def _features(record: Any | None) -> list[str]:
    return features_of(record.tags, record.author_id, record.duration_ms) if record is not None else []


def _embeddings(records: dict[str, Any]) -> VectorTable | None:
    """The embeddings of item events, None where no item has one."""
    ids: list[str] = []
    vectors: list[NDArray[np.float32]] = []
    for item_id, record in records.items():
        if record.embedding is not None:
            dimension = len(vectors[0]) if vectors else None
            vectors.append(check_vector(record.embedding, dimension, f"item event of {item_id!r} in the state"))
            ids.append(item_id)
    return VectorTable(item_ids=ids, vectors=np.stack(vectors)) if ids else None


def _reordered(together: sparse.csr_matrix, behaviour: Behaviour, item_ids: Sequence[str]) -> sparse.csr_matrix:
    """Co-occurrence [N, N] in the catalogue's order, empty rows for items without behaviour."""
    place = {item_id: row for row, item_id in enumerate(item_ids)}
    rows = np.array([place[item_id] for item_id in behaviour.item_ids], np.int64)
    pairs = together.tocoo()
    shape = (len(item_ids), len(item_ids))
    return sparse.coo_matrix((pairs.data, (rows[pairs.row], rows[pairs.col])), shape=shape).tocsr()


def _learn(
    together: sparse.csr_matrix, features: list[list[str]], count_N: NDArray[np.float64], config: CatalogueConfig
) -> tuple[NDArray[np.float32], NDArray[np.str_], SideModel]:
    """Unit vectors from co-occurrence, leaning on side features where an item has been seen little."""
    behaved = factorise(together, config.dimension, config.seed)
    seen = np.abs(behaved).sum(axis=1) > 0
    described = np.array([bool(names) for names in features])
    origin = np.full(len(features), "", "<U12")
    if not seen.any():
        if not described.any():
            origin[count_N > 0] = "mean"
            return behaved, origin, SideModel(vocabulary={}, weights=np.zeros((1, config.dimension), np.float32))
        side = side_only_model([names for names in features if names], config.dimension, config.seed)
    else:
        rows = np.flatnonzero(seen)
        trust = count_N[rows] / (count_N[rows] + TRUST)
        side = fit_side_model([features[row] for row in rows], behaved[rows], trust)
    promised = np.stack([side.vector(names) for names in features])
    share = np.where(described, count_N / (count_N + TRUST), 1.0)[:, None]
    vectors = to_unit(np.where(seen[:, None], share * behaved + (1.0 - share) * to_unit(promised), promised))
    origin[count_N > 0] = "mean"
    origin[described] = "side"
    origin[seen] = "behaviour"
    return vectors, origin, side


def _complete(
    table: VectorTable, item_ids: list[str], together: sparse.csr_matrix, features: list[list[str]],
    count_N: NDArray[np.float64],
) -> tuple[NDArray[np.float32], NDArray[np.str_], SideModel]:
    """The table's vectors; for other items the mean of their neighbours, else what side features say, else the mean."""
    place = {item_id: row for row, item_id in enumerate(item_ids)}
    rows = np.array([place[item_id] for item_id in table.item_ids])
    vectors = np.zeros((len(item_ids), table.vectors.shape[1]), np.float32)
    vectors[rows] = table.vectors
    has = np.zeros(len(item_ids), bool)
    has[rows] = True
    side = fit_side_model([features[row] for row in rows], vectors[rows], np.ones(len(rows)))
    described = np.array([bool(names) for names in features])
    mass = np.asarray(together[:, has].sum(axis=1)).ravel()
    near = (mass > 0) & ~has
    if near.any():
        vectors[near] = (together[near][:, has] @ vectors[has]) / mass[near][:, None]
    for row in np.flatnonzero(~has & ~near & described):
        vectors[row] = side.vector(features[row])
    lonely = ~has & ~near & ~described & (count_N > 0)
    vectors[lonely] = table.vectors.mean(axis=0)
    origin = np.full(len(item_ids), "", "<U12")
    origin[lonely] = "mean"
    origin[described] = "side"
    origin[near] = "behaviour"
    origin[has] = "own"
    return vectors, origin, side
