"""The catalogue as a trie over semantic IDs: what the beam search may generate, and which items a generated ID names.

Nodes of level l (0-based) are numbered in lexicographic order of their prefixes. Level 0 is dense: node = code, so
that the first step of an item needs no gather. A leaf is a node of the last level: the row number of a distinct tuple.
NumPy only; `trainer.beam` walks the arrays in torch, the exported graph takes them as inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onerec.errors import UserError

Ints = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trie:
    """An L-level CSR trie over D distinct tuples of N items; immutable.

    `pointers[l]` [nodes of level l-1, + 1] and `tokens[l]` [nodes of level l] for l = 1..L-1 (entry 0 is
    empty); node n of level l-1 has the children `pointers[l][n]` to `pointers[l][n+1]` (exclusive) of level l.
    `capacity[l]` [nodes of level l]: items below a node. `ancestor[l]` [D]: the node of level l above each leaf.
    `leaf_pointers` [D+1], `leaf_rows` [N]: the items of each leaf, in catalogue order.
    """

    levels: int
    codes: int
    tuples: Ints
    pointers: tuple[Ints, ...]
    tokens: tuple[Ints, ...]
    capacity: tuple[Ints, ...]
    ancestor: tuple[Ints, ...]
    leaf_pointers: Ints
    leaf_rows: Ints

    @property
    def leaves(self) -> int:
        """D, the number of distinct tuples."""
        return len(self.tuples)

    @property
    def items(self) -> int:
        """N, the number of items."""
        return len(self.leaf_rows)

    def leaf_items(self, leaf: int) -> Ints:
        """Catalogue rows of the items that share the tuple of `leaf`, in catalogue order."""
        return self.leaf_rows[self.leaf_pointers[leaf] : self.leaf_pointers[leaf + 1]]

    def session_rows(self, leaves: NDArray[np.integer]) -> Ints:
        """Catalogue rows [..., m] of generated sessions [..., m]: the r-th use of a leaf is the r-th item of its list.

        The leaves must be those of live beams: each used at most as often as it has items, else IndexError.
        """
        use = np.tril(leaves[..., :, None] == leaves[..., None, :], k=-1).sum(-1)
        if (leaves < 0).any() or (use >= self.capacity[-1][self._nodes(leaves)]).any():
            raise IndexError("a session uses a leaf more often than it has items: was a dead beam passed?")
        return self.leaf_rows[self.leaf_pointers[leaves] + use]

    def lookup(self, codes: NDArray[np.integer]) -> NDArray[np.int64]:
        """The leaf [...] of each tuple [..., L], -1 for a tuple that is not in the catalogue."""
        flat = np.asarray(codes, dtype=np.int64).reshape(-1, self.levels)
        legal = ((flat >= 0) & (flat < self.codes)).all(axis=1)
        low = np.zeros(len(flat), dtype=np.int64)
        high = np.full(len(flat), self.leaves)
        for level in range(self.levels):
            column = self.tuples[:, level]
            low, high = (_bisect(column, low, high, flat[:, level] + right) for right in (0, 1))
        return np.where(legal & (low < high), low, -1).reshape(np.shape(codes)[:-1])

    def arrays(self) -> dict[str, Ints]:
        """The inputs of the graph by name, contiguous; see `array_names` for their order.

        `slots{l}` counts 0..C-1 up to the widest node's number of children: its length tells the graph that number.
        """
        found: dict[str, Ints] = {}
        for level in range(self.levels):
            if level > 0:
                found[f"pointers{level}"] = self.pointers[level]
                found[f"tokens{level}"] = self.tokens[level]
                widest = int(np.diff(self.pointers[level]).max())
                found[f"slots{level}"] = np.arange(widest, dtype=np.int32)
            found[f"capacity{level}"] = self.capacity[level]
            if level < self.levels - 1 or level == 0:
                found[f"ancestor{level}"] = self.ancestor[level]
        if self.levels == 1:
            found["leaf0"] = np.maximum(np.cumsum(self.capacity[0] > 0) - 1, 0).astype(np.int32)
        return {name: np.ascontiguousarray(found[name]) for name in array_names(self.levels)}

    def _nodes(self, leaves: NDArray[np.integer]) -> NDArray[np.integer]:
        """Numbers of `leaves` at the last level: the same, but where the last level is the dense one."""
        return self.ancestor[0][leaves] if self.levels == 1 else leaves


def array_names(levels: int) -> list[str]:
    """Names of the trie arrays that a graph of L levels takes, in their fixed order."""
    names = ["capacity0", "ancestor0"]
    if levels == 1:
        return [*names, "leaf0"]
    for level in range(1, levels):
        names += [f"pointers{level}", f"tokens{level}", f"slots{level}", f"capacity{level}"]
        if level < levels - 1:
            names.append(f"ancestor{level}")
    return names


def build_trie(item_codes: NDArray[np.integer], codes: int) -> Trie:
    """The trie of a catalogue: `item_codes` int [N, L], each in 0..codes-1, rows in catalogue order.

    Raises UserError for an empty catalogue and for codes outside the model's range.
    """
    if item_codes.ndim != 2 or item_codes.shape[1] < 1:
        raise UserError(f"item codes must have the shape [items, levels], not {item_codes.shape}")
    if len(item_codes) == 0:
        raise UserError("the catalogue has no items: nothing can be generated; add items with `onerec replay --items`")
    if item_codes.min() < 0 or item_codes.max() >= codes:
        raise UserError(
            f"the codes run from {item_codes.min()} to {item_codes.max()}, the model knows 0 to {codes - 1}; "
            "train a model with enough codes (`--set model.codes=…`) or build the semantic IDs again"
        )
    rows, tuples = _sorted(item_codes, codes)
    levels = tuples.shape[1]
    # differs[:, l]: does row i open a new node of level l, that is, differ from row i-1 in any of the codes 0..l
    differs = np.empty(tuples.shape, dtype=bool)
    differs[0] = True
    np.not_equal(tuples[1:], tuples[:-1], out=differs[1:])
    for level in range(1, levels):
        differs[:, level] |= differs[:, level - 1]
    starts = np.flatnonzero(differs[:, -1])
    distinct, opens = tuples[starts], differs[starts]
    leaf_pointers = np.append(starts, len(rows)).astype(np.int32)

    pointers, tokens, ancestor, capacity = [np.empty(0, np.int32)], [np.empty(0, np.int32)], [distinct[:, 0].copy()], []
    capacity.append(np.bincount(tuples[:, 0], minlength=codes).astype(np.int32))
    for level in range(1, levels):
        first = np.flatnonzero(opens[:, level])
        children = np.bincount(ancestor[-1][first], minlength=len(capacity[-1]))
        pointers.append(np.append(0, np.cumsum(children)).astype(np.int32))
        tokens.append(distinct[first, level])
        ancestor.append((np.cumsum(opens[:, level]) - 1).astype(np.int32))
        capacity.append(np.diff(leaf_pointers[np.append(first, len(starts))]))
    return Trie(
        levels=levels,
        codes=codes,
        tuples=distinct,
        pointers=tuple(pointers),
        tokens=tuple(tokens),
        capacity=tuple(capacity),
        ancestor=tuple(ancestor),
        leaf_pointers=leaf_pointers,
        leaf_rows=rows.astype(np.int32),
    )


def _sorted(item_codes: NDArray[np.integer], codes: int) -> tuple[NDArray[np.int64], Ints]:
    """Rows in lexicographic order of their codes, ties in catalogue order, and their codes, int32 [N, L]."""
    count, levels = item_codes.shape
    width, row_bits = max(1, (codes - 1).bit_length()), max(1, (count - 1).bit_length())
    if levels * width + row_bits > 63:
        rows = np.lexsort(item_codes.T[::-1])
        return rows, item_codes[rows].astype(np.int32)
    # One sort of (tuple, row) packed into 64 bits is several times faster than a stable argsort, and as stable.
    key = np.zeros(count, dtype=np.int64)
    for level in range(levels):
        key <<= width
        key |= item_codes[:, level]
    key <<= row_bits
    key |= np.arange(count)
    key.sort()
    rows = key & ((1 << row_bits) - 1)
    tuples = np.empty((count, levels), dtype=np.int32)
    for level in range(levels):
        tuples[:, level] = (key >> (row_bits + width * (levels - 1 - level))) & ((1 << width) - 1)
    return rows, tuples


def _bisect(
    column: Ints, low: NDArray[np.int64], high: NDArray[np.int64], value: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Left insertion point of each value in its own slice column[low:high], which is sorted."""
    low, high = low.copy(), high.copy()
    while (low < high).any():
        middle = (low + high) // 2
        below = (low < high) & (column[np.minimum(middle, len(column) - 1)] < value)
        low, high = np.where(below, middle + 1, low), np.where(below | (low >= high), high, middle)
    return low
