"""Item vectors from behaviour: which items stand near each other in sessions and histories, factorised."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

REACH = 16
"""How many places apart two items of a list still count as seen together."""
SKIPPED_WEIGHT = 0.1
"""An item that was shown but not effectively watched says little of taste, but is better than nothing."""
NEWEST_SESSIONS = 2_000_000
MOST_ENTRIES = 1 << 26
"""Bounds on what is held at once (about 800 MB), however long the log: the newest sessions, then histories."""
CONTEXT_POWER = 0.75
"""Smoothing of how often an item occurs (word2vec's), so that rare pairs do not get the largest weights."""


class ItemSource(Protocol):
    """What the catalogue reads of the state; `streaming.store.Reader` has it."""

    def sessions(self, after: int = 0) -> Iterator[tuple[int, Any]]:
        """Sessions in commit order with their sequence numbers."""

    def last_sequence(self) -> int:
        """The sequence number of the newest session."""

    def users(self) -> Iterator[tuple[str, list[str]]]:
        """H(∞) of every user."""

    def items(self, after: int = 0) -> Iterator[tuple[int, Any]]:
        """Catalogue entries in order of arrival with their sequence numbers."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """Lists of items that belong together, flat.

    `item_ids`: the items, by first appearance; `items` int32 [T] and `weights` float32 [T] the entries of all lists;
    `lists` int32 [T] the list of each entry; `counts` float64 [N] weighted appearances in sessions and histories;
    `last_session`: the sequence number of the last session in the store, also where `until` left it out.
    """

    item_ids: list[str]
    items: NDArray[np.int32]
    weights: NDArray[np.float32]
    lists: NDArray[np.int32]
    counts: NDArray[np.float64]
    last_session: int


def collect_behaviour(source: ItemSource, until: int | None, progress: Callable[[int], None]) -> Behaviour:
    """One list for each session's items, and one for each user's newest history, within the bounds above.

    With `until` (ms) only sessions that ended by then, and of histories only those that open such a session, because
    H(∞) has no times: nothing after `until` is looked at. `progress` hears how many sessions were read.
    """
    index: dict[str, int] = {}
    items, weights, lists = array("i"), array("f"), array("i")
    newest: dict[str, list[str]] = {}
    number = sequence = 0

    def add(entries: Iterable[tuple[str, float]]) -> None:
        nonlocal number
        for item_id, weight in entries:
            items.append(index.setdefault(item_id, len(index)))
            weights.append(weight)
            lists.append(number)
        number += 1

    for sequence, session in source.sessions(after=max(0, source.last_sequence() - NEWEST_SESSIONS)):
        if until is not None and session.end > until:
            continue
        entries = [(item.item_id, 1.0 if item.effective or item.interactions else SKIPPED_WEIGHT)
                   for item in session.items]
        add(entries)
        if until is not None:
            newest[session.user_id] = session.history + [item for item, weight in entries if weight == 1.0]
        if sequence % 1000 == 0:
            progress(number)
    histories = source.users() if until is None else iter(newest.items())
    for _, history in histories:
        if len(items) > MOST_ENTRIES:
            break
        add((item_id, 1.0) for item_id in history)
    rows = np.frombuffer(items, np.int32) if items else np.empty(0, np.int32)
    mass = np.frombuffer(weights, np.float32) if weights else np.empty(0, np.float32)
    return Behaviour(
        item_ids=list(index),
        items=rows,
        weights=mass,
        lists=np.frombuffer(lists, np.int32) if lists else np.empty(0, np.int32),
        counts=np.bincount(rows, weights=mass, minlength=len(index)).astype(np.float64),
        last_session=sequence,
    )


def cooccurrence(behaviour: Behaviour) -> sparse.csr_matrix:
    """How much two items stand near each other, float64 [N, N], symmetric, no diagonal.

    Linear in the length of the log: every entry meets the `REACH` entries after it in its list.
    """
    size = len(behaviour.item_ids)
    total = sparse.csr_matrix((size, size))
    for step in range(1, REACH + 1):
        left, right = behaviour.items[:-step], behaviour.items[step:]
        pair = (behaviour.lists[:-step] == behaviour.lists[step:]) & (left != right)
        mass = behaviour.weights[:-step][pair].astype(np.float64) * behaviour.weights[step:][pair]
        total = total + sparse.coo_matrix((mass, (left[pair], right[pair])), shape=(size, size)).tocsr()
    return (total + total.T).tocsr()


def factorise(together_NN: sparse.csr_matrix, dimension: int, seed: int) -> NDArray[np.float32]:
    """Unit vectors [N, d] whose products approximate positive pointwise mutual information; zero for lonely items."""
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    size = together_NN.shape[0]
    pairs = together_NN.tocoo()
    vectors = np.zeros((size, dimension), np.float32)
    rank = min(dimension, size)
    if not pairs.nnz:
        return vectors
    mass = np.asarray(together_NN.sum(axis=1)).ravel()
    context = mass**CONTEXT_POWER
    context /= context.sum()
    pmi = np.log(pairs.data / (mass[pairs.row] * context[pairs.col]))
    kept = pmi > 0
    ppmi = sparse.csr_matrix((pmi[kept], (pairs.row[kept], pairs.col[kept])), shape=together_NN.shape)
    if not ppmi.nnz:
        return vectors
    with threadpool_limits(limits=1):
        left, singular, _ = randomized_svd(ppmi, rank, random_state=seed)
    found = left * np.sqrt(singular)
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    vectors[:, :rank] = np.where(norms > 1e-9, found / np.maximum(norms, 1e-9), 0.0)
    return vectors
