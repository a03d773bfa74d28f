"""How old knowledge is at each hand-off with everything running at live pace: figures, a table and a picture.

    python -m benchmarks.freshness [--kafka] [--minutes 5] [--rate 1000] [--publish-every 10] [--work DIR] [--out DIR]

Starts `onerec run --simulate --rate …`, waits for the first answer and until what piled up before it is learnt, and then
takes the differences of the histograms that its metrics page shows. Nothing is timed from outside: these are the same
figures that Prometheus would see. The table in docs/freshness.md and the picture show both routes, embedded and Kafka.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.kafka_tools import Process, family, free_port
from benchmarks.markers import put_between
from benchmarks.seed_models import pyplot_agg, write_json
from onerec.monitor.families import AGE_STAGES

ROOT: Final = Path(__file__).resolve().parents[1]
START_SECONDS: Final = 300.0
WARM_SECONDS: Final = 30.0
CAUGHT_UP_SECONDS: Final = 12.0
"""The trainer has learnt all that piled up while it started once its newest event is no older."""
CATCH_UP_SECONDS: Final = 180.0
SCRAPE_SECONDS: Final = 2.0
GOALS: Final = {"answered": 30.0, "new item": 10.0, "history used": 2.0}
"""Seconds, p95 (for new items the largest)."""
COUNTED: Final = ("onerec_events_total", "onerec_sessions_total", "onerec_train_sessions_total", "onerec_publishes_total")

Page = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(url: str) -> Page:
    """Every sample of a metrics page by name and labels; empty where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own address
            text = answer.read().decode()
    except OSError:
        return {}
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for found in text_string_to_metric_families(text)
        for sample in found.samples
    }


def total(page: Page, name: str, **labels: str) -> float:
    """The sum of a sample over all label sets that have these labels."""
    return sum(value for (found, pairs), value in page.items() if found == name and labels.items() <= dict(pairs).items())


def buckets(page: Page, name: str, **labels: str) -> dict[float, float]:
    """A histogram's cumulative counts by upper bound, summed over the processes that have one."""
    counts: dict[float, float] = {}
    for (found, pairs), value in page.items():
        named = dict(pairs)
        if found == f"{name}_bucket" and labels.items() <= named.items():
            bound = float(named["le"])
            counts[bound] = counts.get(bound, 0.0) + value
    return counts


def between(before: Page, after: Page, name: str, **labels: str) -> dict[str, float] | None:
    """What a histogram saw between two scrapes: count, p50, p95 and the bound below which all lie; None: nothing.

    Quantiles are interpolated within their bucket, as Prometheus does; seconds.
    """
    first, last = buckets(before, name, **labels), buckets(after, name, **labels)
    bounds = sorted(last)
    counts = np.array([last[bound] - first.get(bound, 0.0) for bound in bounds])
    if not len(counts) or counts[-1] <= 0:
        return None
    return {
        "count": float(counts[-1]),
        "p50": quantile(bounds, counts, 0.5),
        "p95": quantile(bounds, counts, 0.95),
        "below": float(bounds[int(np.searchsorted(counts, counts[-1]))]),
    }


def quantile(bounds: list[float], counts: np.ndarray, share: float) -> float:
    """The value below which `share` of cumulative `counts` lies."""
    rank = share * counts[-1]
    place = int(np.searchsorted(counts, rank))
    low = bounds[place - 1] if place else 0.0
    if not np.isfinite(bounds[place]):
        return float(low)
    below = counts[place - 1] if place else 0.0
    return float(low + (bounds[place] - low) * (rank - below) / (counts[place] - below))


def cpu_of(pids: Mapping[str, int]) -> dict[str, float]:
    """Processor seconds of each part and all below it so far; those that have ended are left out."""
    used = {}
    for name, pid in pids.items():
        try:
            used[name] = sum(_spent(each) for each in family(pid))
        except OSError:
            continue
    return used


def _spent(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return sum(int(value) for value in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def machine_busy() -> float:
    """Processor seconds that the whole machine has worked."""
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def trained_age(page: Page) -> float:
    """Seconds between the log's clock and the newest event learnt; infinite where one is not known."""
    found = [value for (name, labels), value in page.items()
             if name == "onerec_watermark_seconds" and {("stage", "trained"), ("process", "train")} <= set(labels)]
    clocks = [value for (name, _), value in page.items() if name == "onerec_log_clock_seconds"]
    return max(clocks) - max(found) if found and clocks else float("inf")


def wait(run: Process, pattern: str, seconds: float) -> str:
    """The first group of the pattern, once the run has said it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and run.running:
        if found := re.search(pattern, run.text()):
            return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"no {pattern!r} within {seconds:.0f} s:\n{run.text()[-3000:]}")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run from its start to its end, and what it showed after the warm-up."""
    words = ["run", "--simulate", "--rate", str(options.rate), "--publish-every", str(options.publish_every),
             "--metrics-port", "0", "--http-port", "0", "--grpc-port", "0", "--triton-metrics-port", "0",
             "--state", str(folder / "state"), "--run", str(folder / "run"), "--repository", str(folder / "repository")]
    if options.kafka:
        words += ["--kafka", "--set", f"kafka.bootstrap=127.0.0.1:{free_port()}"]
    words += [part for setting in options.set or [] for part in ("--set", setting)]
    with Process.onerec(folder / "run.log", *words) as run:
        url = wait(run, r"metrics of all parts (\S+)", 60)
        parts = {}
        for stage, (name, labels) in {
            "first event in a history": ("onerec_age_seconds_count", {"stage": "history"}),
            "first event learnt": ("onerec_age_seconds_count", {"stage": "trained"}),
            "first version answers": ("onerec_replica_version", {}),
        }.items():
            while total(scrape(url), name, **labels) <= 0:
                if not run.running or time.monotonic() - run.began > START_SECONDS:
                    raise RuntimeError(f"no {stage} within {START_SECONDS:.0f} s:\n{run.text()[-3000:]}")
                time.sleep(0.5)
            parts[stage] = round(time.monotonic() - run.began, 1)
            print(f"{stage}: {parts[stage]} s", flush=True)
        answered = time.monotonic()
        while trained_age(scrape(url)) > CAUGHT_UP_SECONDS and time.monotonic() - answered < CATCH_UP_SECONDS:
            time.sleep(0.5)
        parts["backlog of the start learnt"] = round(time.monotonic() - run.began, 1)
        print(f"backlog learnt: {parts['backlog of the start learnt']} s", flush=True)
        time.sleep(options.warm_up)
        pids = {"run": run.pid, **{name: int(pid) for name, pid in re.findall(r"(\S+) started \(pid (\d+)\)", run.text())}}
        before, cpu, busy, began = scrape(url), cpu_of(pids), machine_busy(), time.monotonic()
        headline: list[list[float]] = []
        while time.monotonic() - began < options.minutes * 60:
            if not run.running:
                raise RuntimeError(f"the run ended:\n{run.text()[-3000:]}")
            page = scrape(url)
            ages = [value for (name, _), value in page.items() if name == "onerec_freshness_seconds"]
            if ages:
                headline.append([round(time.monotonic() - began, 1), max(ages)])
            time.sleep(SCRAPE_SECONDS)
        after, seconds = scrape(url), time.monotonic() - began
        used = {name: spent - cpu[name] for name, spent in cpu_of(pids).items() if name in cpu}
        used["run"] -= sum(spent for name, spent in used.items() if name != "run")
        worked = machine_busy() - busy
        run.signal(signal.SIGTERM)
        text = run.text()
    return {
        "route": "kafka" if options.kafka else "embedded", "rate": options.rate, "publish_every_s": options.publish_every,
        "seconds": round(seconds), "cores": os.cpu_count(), "start_s": parts,
        "world": wait_text(text, r"(a world at live pace: .*)"),
        "age_s": {stage: between(before, after, "onerec_age_seconds", stage=stage) for stage in AGE_STAGES},
        "pair_age_s": between(before, after, "onerec_pair_age_seconds", stage="trained"),
        "new_item_s": between(before, after, "onerec_new_item_age_seconds"),
        "history_used_s": between(before, after, "onerec_history_used_age_seconds"),
        "answer_s": between(before, after, "onerec_answer_seconds"),
        "per_second": {name: round((total(after, name) - total(before, name)) / seconds, 2) for name in COUNTED},
        "processed_per_second": round(
            (total(after, "onerec_events_total", process="stream-1" if options.kafka else "replay")
             - total(before, "onerec_events_total", process="stream-1" if options.kafka else "replay")) / seconds, 1),
        "versions": total(after, "onerec_replica_version") - total(before, "onerec_replica_version"),
        "cores_used": {name: round(spent / seconds, 3) for name, spent in sorted(used.items(), key=lambda item: -item[1])},
        "cores_used_by_others": round(max(0.0, worked - sum(used.values())) / seconds, 2),
        "restarts": re.findall(r"\d\d:\d\d:\d\d (\S+ (?:ended with|was killed by) \S+ ?\d*)", text),
        "headline_s": headline,
    }


def wait_text(text: str, pattern: str) -> str:
    """The pattern's group in a text; empty where it is not there."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def table(results: Mapping[str, Any]) -> str:
    """Both routes' figures for the document."""
    routes = [route for route in ("embedded", "kafka") if route in results]
    names = {"embedded": "embedded", "kafka": "through Kafka"}
    lines = ["| age at | " + " | ".join(f"{names[route]}: p50 | p95" for route in routes) + " | goal (p95) |",
             "|---|" + "---:|" * (2 * len(routes) + 1)]

    def row(label: str, cells: list[dict[str, float] | None], goal: str = "") -> str:
        shown = [f"{cell['p50']:.1f} s | {cell['p95']:.1f} s" if cell else "no data | no data" for cell in cells]
        return f"| {label} | {' | '.join(shown)} | {goal} |"

    for stage in AGE_STAGES:
        goal = f"{GOALS['answered']:.0f} s" if stage == "answered" else ""
        lines.append(row(f"event → {stage}", [results[route]["age_s"][stage] for route in routes], goal))
    lines.append(row("event → history used in an answer", [results[route]["history_used_s"] for route in routes],
                     f"{GOALS['history used']:.0f} s"))
    lines.append(row("new item → answer that could hold it", [results[route]["new_item_s"] for route in routes],
                     f"{GOALS['new item']:.0f} s"))
    lines.append(row("session's end → its preference pair learnt", [results[route]["pair_age_s"] for route in routes]))
    lines += ["", "| | " + " | ".join(names[route] for route in routes) + " |", "|---|" + "---:|" * len(routes)]
    for label, value in {
        "events/s taken in": lambda found: f"{found['processed_per_second']:,.0f}",
        "high-quality sessions/s learnt": lambda found: f"{found['per_second']['onerec_train_sessions_total']:.0f}",
        "versions a minute": lambda found: f"{60 * found['versions'] / found['seconds']:.1f}",
        "new items: oldest at its first answer, below": lambda found:
            f"{found['new_item_s']['below']:.0f} s" if found["new_item_s"] else "no data",
        "start → first answer": lambda found: f"{found['start_s']['first version answers']:.0f} s",
        "start → backlog of the start learnt": lambda found: f"{found['start_s']['backlog of the start learnt']:.0f} s",
        "measured for": lambda found: f"{found['seconds'] / 60:.1f} min",
        "cores used, of " + str(results[routes[0]]["cores"]): lambda found: f"{sum(found['cores_used'].values()):.2f}",
        "… by": lambda found: ", ".join(f"{name} {cores:.2f}" for name, cores in list(found["cores_used"].items())[:6]),
        "cores used by others meanwhile": lambda found: f"{found['cores_used_by_others']:.2f}",
    }.items():
        lines.append(f"| {label} | " + " | ".join(value(results[route]) for route in routes) + " |")
    return "\n".join(lines)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Bars: what each hand-off adds, at p50 and p95. Below: the headline as it went."""
    plt = pyplot_agg()
    routes = [route for route in ("embedded", "kafka") if route in results]
    figure, (bars, lines) = plt.subplots(2, 1, figsize=(9, 6.5), height_ratios=(1 + len(routes), 2.4), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.95, len(AGE_STAGES)))
    rows = [(route, share) for route in reversed(routes) for share in ("p95", "p50")]
    for place, (route, share) in enumerate(rows):
        left = 0.0
        for stage, colour in zip(AGE_STAGES, colours, strict=True):
            age = (results[route]["age_s"][stage] or {}).get(share, left)
            width = max(0.0, age - left)
            bars.barh(place, width, left=left, color=colour, label=stage if place == 0 else None)
            if width > 0.6:
                light = colour[:3].mean() > 0.5
                bars.text(left + width / 2, place, f"{width:.1f}", ha="center", va="center",
                          color="black" if light else "white", fontsize=8)
            left = max(left, age)
        bars.text(left + 0.3, place, f"{left:.1f} s", va="center", fontsize=9)
    bars.axvline(GOALS["answered"], color="tab:red", linestyle="--", linewidth=1)
    bars.set_yticks(range(len(rows)), [f"{route}, {share}" for route, share in rows])
    bars.set_xlabel("seconds since the event; a colour ends where the event has got to (red: the goal for p95)")
    bars.legend(ncols=len(AGE_STAGES), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    for route, colour in zip(routes, ("tab:blue", "tab:orange"), strict=False):
        points = np.array(results[route]["headline_s"])
        if len(points):
            lines.plot(points[:, 0], points[:, 1], color=colour, label=route, linewidth=1)
    lines.axhline(GOALS["answered"], color="tab:red", linestyle="--", linewidth=1)
    lines.set_xlabel("seconds of the measurement")
    lines.set_ylabel("clock − newest event\nlearnt by what answers, s")
    lines.set_ylim(bottom=0)
    lines.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kafka", action="store_true", help="through a Kafka of its own")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long is measured, after the warm-up")
    parser.add_argument("--warm-up", type=float, default=WARM_SECONDS, help="seconds after the backlog of the start is learnt")
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--publish-every", type=float, default=10.0)
    parser.add_argument("--set", action="append", help="as for onerec run")
    parser.add_argument("--work", type=Path, help="keep the run's folders here")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where figures, table and picture go")
    return parser.parse_args()


def main() -> None:
    """Measure, and put the figures beside those of the other route."""
    options = arguments()
    folder = options.work or Path(tempfile.mkdtemp(prefix="onerec-freshness-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(folder, options)
    finally:
        if options.work is None:
            shutil.rmtree(folder, ignore_errors=True)
    path = options.out / "results-freshness.json"
    results = orjson.loads(path.read_bytes()) if path.exists() else {}
    results[found["route"]] = found
    write_json(path, results)
    draw(results, options.out / "figures" / "freshness.png")
    shown = table(results)
    if (document := options.out / "freshness.md").exists():
        put_between(document, "benchmarks.freshness", shown)
    print(shown)
    print(orjson.dumps({name: value for name, value in found.items() if name != "headline_s"},
                       option=orjson.OPT_INDENT_2).decode())


if __name__ == "__main__":
    main()
