"""What a codebook is worth before anyone trains on it: loads, collisions, error, neighbours that share a prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onerec.errors import Failure
from trainer.config import CatalogueConfig
from trainer.semantic_ids import METHODS, fit

NEIGHBOURS = 10
SAMPLED = 1000
"""Items whose neighbours are looked up; each costs a comparison with all items."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Figures of one assignment; lists are by level, loads count the items that the codebook was fitted on.

    `load_std`; `entropy` of a level's loads over its largest value (1 = all codes equally full); `used_codes`.
    `distinct` tuples, `shared` tuples of more than one item, `sharing` items in them, `longest` such list.
    `errors`: mean squared residual after each level, None without vectors; `norm`: before the first.
    `neighbours`: share of nearest neighbours (cosine) with the same first 1…L codes; `chance`: of any two items.
    """

    load_min: list[int]
    load_max: list[int]
    load_std: list[float]
    entropy: list[float]
    used_codes: list[int]
    distinct: int
    shared: int
    sharing: int
    longest: int
    norm: float | None
    errors: list[float] | None
    neighbours: list[float] | None
    chance: list[float]
    loads: list[list[int]]


def measure(
    codes_NL: NDArray[np.int32], fitted_N: NDArray[np.bool_], codes: int, *,
    vectors_nd: NDArray[np.float32] | None, errors: list[float] | None, seed: int = 0,
) -> Quality:
    """Quality of the codes of N items, the first n of which have `vectors_nd` (NaN: no vector)."""
    loads_LK = np.stack([np.bincount(level, minlength=codes) for level in codes_NL[fitted_N].T])
    share_LK = loads_LK / loads_LK.sum(axis=1, keepdims=True)
    logs = np.log(share_LK, out=np.zeros_like(share_LK), where=share_LK > 0)
    reachable = max(2, min(codes, int(fitted_N.sum())))
    _, lists = np.unique(codes_NL, axis=0, return_counts=True)
    return Quality(
        load_min=loads_LK.min(axis=1).tolist(),
        load_max=loads_LK.max(axis=1).tolist(),
        load_std=loads_LK.std(axis=1).tolist(),
        entropy=(-(share_LK * logs).sum(axis=1) / np.log(reachable)).tolist(),
        used_codes=(loads_LK > 0).sum(axis=1).tolist(),
        distinct=len(lists),
        shared=int((lists > 1).sum()),
        sharing=int(lists[lists > 1].sum()),
        longest=int(lists.max()),
        norm=errors[0] if errors else None,
        errors=errors[1:] if errors else None,
        neighbours=None if vectors_nd is None else _neighbours(codes_NL, vectors_nd, seed),
        chance=_chance(codes_NL),
        loads=loads_LK.tolist(),
    )


def compare(
    vectors_nd: NDArray[np.float32], *, levels: int, codes: int, settings: CatalogueConfig,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Quality]:
    """All three methods fitted on the same vectors from the same seed, by name."""
    found: dict[str, Quality] = {}
    for method in METHODS:
        progress(f"fitting {method}")
        book = fit(vectors_nd, levels=levels, codes=codes, method=method, iterations=settings.iterations,
                   rng=np.random.default_rng(settings.seed))
        found[method] = measure(book.codes, np.ones(len(vectors_nd), bool), codes, vectors_nd=vectors_nd,
                                errors=book.errors, seed=settings.seed)
    return found


def plot(qualities: Mapping[str, Quality], path: Path) -> None:
    """Loads, error and neighbours of each assignment in one picture; the end of the name says the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loads, errors, prefix) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for number, (name, quality) in enumerate(qualities.items()):
        colour = f"C{number}"
        levels = range(1, len(quality.loads) + 1)
        for level, style in zip(levels, ("-", "--", ":", "-."), strict=False):
            ordered = sorted(quality.loads[level - 1], reverse=True)
            loads.plot(ordered, style, color=colour, label=f"{name}, level {level}")
        if quality.errors is not None:
            errors.plot([0, *levels], [quality.norm, *quality.errors], "o-", color=colour, label=name)
        if quality.neighbours is not None:
            prefix.plot(levels, quality.neighbours, "o-", color=colour, label=f"{name}, neighbours")
            prefix.plot(levels, quality.chance, "x:", color=colour, label=f"{name}, any two items")
    loads.set(title="Items per code", xlabel="codes, fullest first", ylabel="items")
    errors.set(title="Reconstruction error", xlabel="levels used", ylabel="mean squared residual")
    prefix.set(title="Same prefix", xlabel="prefix length", ylabel="share of pairs")
    prefix.set_yscale("symlog", linthresh=1e-4)
    for axes in (loads, errors, prefix):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    for axes in (errors, prefix):
        axes.xaxis.get_major_locator().set_params(integer=True)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise Failure(f"plot {path} cannot be written: {error}; name a .png, .svg or .pdf in a folder that you may "
                      "write to") from None
    finally:
        pyplot.close(figure)


def _neighbours(codes_NL: NDArray[np.int32], vectors_nd: NDArray[np.float32], seed: int) -> list[float] | None:
    """Share of the nearest neighbours of sampled items that have the same first 1…L codes."""
    has = np.flatnonzero(np.isfinite(vectors_nd).all(axis=1) & (np.abs(vectors_nd).sum(axis=1) > 0))
    wanted = min(NEIGHBOURS, len(has) - 1)
    if wanted < 1:
        return None
    units = vectors_nd[has] / np.linalg.norm(vectors_nd[has], axis=1, keepdims=True)
    rows = np.sort(np.random.default_rng(seed).choice(len(has), min(SAMPLED, len(has)), replace=False))
    same = np.zeros(codes_NL.shape[1])
    for some in np.array_split(rows, -(-len(rows) // 100)):
        near = units[some] @ units.T
        near[np.arange(len(some)), some] = -np.inf
        nearest = np.argpartition(near, -wanted, axis=1)[:, -wanted:]
        equal = codes_NL[has[nearest]] == codes_NL[has[some]][:, None]
        same += np.logical_and.accumulate(equal, axis=2).sum(axis=(0, 1))
    return (same / (len(rows) * wanted)).tolist()


def _chance(codes_NL: NDArray[np.int32]) -> list[float]:
    """Share of all pairs of different items that have the same first 1…L codes."""
    items, levels = codes_NL.shape
    shares = []
    for level in range(1, levels + 1):
        _, counts = np.unique(codes_NL[:, :level], axis=0, return_counts=True)
        shares.append(float((counts * (counts - 1)).sum() / max(1, items * (items - 1))))
    return shares
