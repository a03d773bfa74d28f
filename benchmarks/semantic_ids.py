"""Semantic IDs at 100,000 × 64, K = 256: time of one assignment in four forms, quality after whole fits.

python -m benchmarks.semantic_ids [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from trainer.codebook_report import measure
from trainer.semantic_ids import (
    METHODS,
    Floats,
    Rows,
    assign_deferred,
    assign_greedy,
    assign_naive,
    assign_plain,
    balanced_loads,
    fit,
    nearest_codes,
)

FORMS: dict[str, Callable[[Floats, Floats, Rows], Rows]] = {
    "greedy, naive loop": assign_naive,
    "greedy, GEMM": assign_greedy,
    "deferred acceptance": assign_deferred,
    "plain k-means": assign_plain,
}


def world(items: int, dimension: int, seed: int) -> Floats:
    """Vectors around 1,000 centres whose sizes follow a power law, as the categories of a catalogue do."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(1000, dimension))
    share = 1.0 / np.arange(1, 1001)
    return centres[rng.choice(1000, items, p=share / share.sum())] + 0.7 * rng.normal(size=(items, dimension))


def speed(points: Floats, codes: int, repeats: int) -> dict[str, float]:
    """CPU seconds of one assignment (median) per form, same points, same centroids, one thread.

    CPU time, because one thread waits for nothing but other programs.
    """
    centroids = points[np.random.default_rng(1).choice(len(points), codes, replace=False)]
    loads = balanced_loads(len(points), codes)
    seconds: dict[str, float] = {}
    found: dict[str, Rows] = {}
    for name, assign in FORMS.items():
        taken = []
        for _ in range(1 if assign is assign_naive else repeats):
            began = time.process_time()
            found[name] = assign(points, centroids, loads)
            taken.append(time.process_time() - began)
        seconds[name] = statistics.median(taken)
    if not np.array_equal(found["greedy, naive loop"], found["greedy, GEMM"]):
        raise SystemExit("the two forms of the greedy pass differ")
    return seconds


def quality(points: Floats, codes: int, levels: int, iterations: int) -> dict[str, dict[str, Any]]:
    """Loads, error, collisions and neighbours of every method from the same seed, with the seconds of the fit."""
    report = {}
    for method in METHODS:
        began = time.process_time()
        book = fit(points, levels=levels, codes=codes, method=method, iterations=iterations,
                   rng=np.random.default_rng(0))
        seconds = time.process_time() - began
        figures = measure(book.codes, np.ones(len(points), bool), codes, vectors_nd=points.astype(np.float32),
                          errors=book.errors)
        again = nearest_codes(points[:5000], book.centroids, book.used)
        report[method] = {
            "cpu_seconds": round(seconds, 2), "load_min": figures.load_min, "load_max": figures.load_max,
            "reconstruction_error": figures.errors, "distinct_triples": figures.distinct,
            "shared_triples": figures.shared, "items_sharing": figures.sharing, "longest_list": figures.longest,
            "neighbour_prefix": figures.neighbours,
            "argmin_load_max": np.bincount(
                assign_plain(points, book.centroids[0].astype(np.float64), np.ones(codes, np.int64))).max().item(),
            "argmin_same_codes": float((again == book.codes[:5000]).all(axis=1).mean()),
        }
    return report


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    points = world(options.items, options.dimension, 0)
    with threadpool_limits(limits=1):
        seconds = speed(points, options.codes, options.repeats)
    naive = seconds["greedy, naive loop"]
    made = quality(points, options.codes, options.levels, options.iterations)
    if options.json:
        print(json.dumps({"items": options.items, "dimension": options.dimension, "codes": options.codes,
                          "seconds": seconds, "quality": made}))
        return
    console = Console()
    times = Table(title=f"One assignment of {options.items:,} × {options.dimension}, K = {options.codes}, one thread")
    for column in ("form", "CPU seconds", "naive / this"):
        times.add_column(column, justify="left" if column == "form" else "right")
    for name, value in seconds.items():
        times.add_row(name, f"{value:.3f}", f"{naive / value:.1f}")
    console.print(times)
    table = Table(title=f"After {options.levels} levels of at most {options.iterations} iterations")
    for column in ("", *METHODS):
        table.add_column(column, justify="left" if not column else "right")
    for key in next(iter(made.values())):
        table.add_row(key, *(_shown(made[method][key]) for method in METHODS))
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_shown(one) for one in value)
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    main()
