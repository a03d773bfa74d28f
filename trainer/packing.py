"""Packing: several short histories share one row of the encoder, so that little is computed for padding.

Real histories are short (half of KuaiRand's have five items or fewer) and a few are long; padded to the longest, most
of the encoder's work is for nothing. Packed histories do not see each other, so the result is the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Where each sequence stands: G rows of width S hold B sequences.

    `owner [G, S]` is the sequence at each position, -1 for padding; `source [G, S]` the position's number when all
    sequences are laid end to end, 0 for padding; `place [B, longest]` the way back, into `[G · S]`, 0 beyond a
    sequence's end.
    """

    owner: np.ndarray
    source: np.ndarray
    place: np.ndarray


def pack(lengths: np.ndarray, width: int) -> Packing:
    """First fit, longest first, into rows of `width` ≥ every one of `lengths [B]` (each ≥ 1)."""
    free: list[int] = []
    starts = np.zeros(len(lengths), np.int64)
    rows = np.zeros(len(lengths), np.int64)
    for sequence in np.argsort(-lengths, kind="stable"):
        length = int(lengths[sequence])
        row = next((row for row, space in enumerate(free) if space >= length), len(free))
        if row == len(free):
            free.append(width)
        rows[sequence], starts[sequence] = row, width - free[row]
        free[row] -= length
    inside = np.arange(int(lengths.max())) < lengths[:, None]
    place = np.where(inside, (rows * width + starts)[:, None] + np.arange(inside.shape[1]), 0)
    owner = np.full(len(free) * width, -1, np.int64)
    source = np.zeros(len(free) * width, np.int64)
    owner[place[inside]] = np.nonzero(inside)[0]
    source[place[inside]] = np.arange(int(lengths.sum()))
    return Packing(owner.reshape(-1, width), source.reshape(-1, width), place)
