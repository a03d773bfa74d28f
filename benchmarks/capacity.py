"""A capacity plan on paper: what 100 million daily users take, from figures measured here and assumptions that are named.

    python -m benchmarks.capacity --figures docs/results-kafka.json                          # prints the tables
    python -m benchmarks.capacity --figures docs/results-kafka.json --write docs/capacity.md # puts them between its markers
    python -m benchmarks.capacity --figures docs/results-kafka.json --assume daily_users=1e7 --assume peak=4

Every row says where it comes from: a command of this project, an assumption, or the formula over rows above it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.markers import put_between
from benchmarks.train import step_flops
from trainer.config import ModelConfig
from trainer.presets import PRESETS

DAY: Final = 86_400
PRESET: Final = "1B"


def _assumed(value: float, unit: str, why: str) -> Any:
    return dataclasses.field(default=value, metadata={"unit": unit, "why": why})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Assumed:
    """What nobody measured here; each may be set on the command line."""

    daily_users: float = _assumed(100e6, "", "the size asked for")
    kept_users: float = _assumed(300e6, "", "users whose state is kept: three times the daily ones")
    events_per_user: float = _assumed(200, "a day", "about 180 watches and 20 interactions; the simulated world has 21")
    sessions_per_user: float = _assumed(8, "a day", "25 events a session; the simulated world has 14")
    peak: float = _assumed(2.5, "×", "busiest hour over the day's mean")
    load: float = _assumed(0.5, "", "share of what a process can do that is planned for; the rest catches up after a fault")
    replication: float = _assumed(3, "copies", "`kafka.replication`")
    broker_bytes: float = _assumed(200e6, "B/s", "written by one broker, copies included, with twice that read")
    requests_per_user: float = _assumed(40, "a day", "a session of five videos a request, 200 videos a day")
    history_items: float = _assumed(256, "items", "`history.length`: everyone's is full")
    good_share: float = _assumed(0.5, "", "sessions of high quality; the simulated world has about as many")
    windows: float = _assumed(5, "a session", "targets of five items in a session of 25")
    gpu_flops: float = _assumed(989e12, "FLOP/s", "dense bf16 peak of one H100 or H200, by its data sheet")
    train_mfu: float = _assumed(0.237, "", "OneRec's technical report; on the CPU here 0.25 to 0.5 (docs/results-train.md)")
    serve_mfu: float = _assumed(0.10, "", "a third of the 0.287 that the report has after its own operators were written")
    beams: float = _assumed(128, "beams", "`beam.width`")
    core_hour: float = _assumed(0.04, "$", "a core with 4 GB for an hour, list price of a large cloud")
    gpu_hour: float = _assumed(3.0, "$", "a GPU of that kind for an hour")
    disk_month: float = _assumed(0.08, "$/GB", "a gigabyte of network SSD for a month")


def _text(value: float, unit: str = "") -> str:
    """Three digits, and the unit with its prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:,.3g} {prefix}{unit}"
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + (unit and f" {unit}")


def measured(figures: dict[str, Any]) -> list[tuple[str, float, str, str]]:
    """(name, value, unit, command) of what the plan takes from measurements."""
    through, soak = figures["throughput"], figures["soak"]
    stream = max(found["rate"] for found in through["stream"].values())
    peak_memory = max(found["peak_mb"] for found in through["stream"].values())
    rounds = [soak["recovery"], *figures.get("recovery", {}).get("rounds", [])]
    recovery = statistics.median(found["seconds_per_million"] for found in rounds)
    topics = soak["topic_bytes_per_event"]
    command = "`python -m benchmarks.kafka {}`".format
    return [
        ("stream_rate", stream, "events/s a worker", command("throughput")),
        ("ingest_rate", through["ingest"]["200"]["rate"], "events/s an instance, packed", command("throughput")),
        ("raw_bytes", topics["watch"] + topics["interactions"], "B an event in the raw topics, on disk", command("soak")),
        ("events_bytes", topics["events"], "B an event in `events`", command("soak")),
        ("sessions_bytes", topics["sessions"], "B an event in `sessions`", command("soak")),
        ("histories_bytes", topics["histories"], "B an event in `histories`, as far as compacted", command("soak")),
        ("state_bytes", soak["state_bytes_per_user"], "B a user in a worker's RocksDB", command("soak")),
        ("state_events", soak["events"] / soak["users"], "events a user in that soak", command("soak")),
        ("recovery", recovery, "s a million changelog records", command("soak")),
        ("worker_mb", peak_memory, "MiB resident of a worker", command("throughput")),
    ]


def _serve_flops(config: ModelConfig, history: float, beams: float) -> float:
    """One request: the encoder once, then every beam through the decoder at each of its positions."""
    d, memory = config.d_model, 1 + history
    queries = config.session_items * (config.levels + 1)
    encoder = config.encoder_layers * (memory * (4 * d * d + 2 * d * config.d_ff) + 2 * d * memory**2)
    expert = config.top_k * 2 * d * config.d_ff + config.experts * d
    each = 6 * d * d + expert + 2 * d * (queries / 2 + memory)
    decoder = config.decoder_layers * (beams * queries * each + 2 * d * d * memory)
    return 2 * (encoder + decoder + beams * config.session_items * config.levels * config.codes * d)


def plan(assumed: Assumed, found: dict[str, float]) -> list[tuple[str, float, str, str]]:
    """(what, value, unit, formula), each from the rows above it."""
    a, config = assumed, PRESETS[PRESET]
    daily = a.daily_users * a.events_per_user
    peak = daily / DAY * a.peak
    workers = math.ceil(peak / (found["stream_rate"] * a.load))
    ingests = math.ceil(peak / (found["ingest_rate"] * a.load))
    partitions = 2 ** math.ceil(math.log2(4 * workers))
    users = a.kept_users / workers
    # The live part is bounded and the history full for everyone here; the soak's users had fewer events.
    full = max(1.0, a.history_items / min(a.history_items, found["state_events"]))
    state = found["state_bytes"] * full
    written = found["raw_bytes"] + found["events_bytes"] + found["sessions_bytes"] + found["histories_bytes"]
    traffic = peak * written * a.replication
    disk = a.replication * (
        daily * (7 * (found["raw_bytes"] + found["events_bytes"]) + 30 * found["sessions_bytes"]) + 2 * a.kept_users * state
    )
    brokers = math.ceil(max(traffic / a.broker_bytes, disk / 20e12))
    windows = a.daily_users * a.sessions_per_user * a.good_share * a.windows / DAY
    train = step_flops(config, np.array([a.history_items]))
    ranks = math.ceil(windows * train / (a.gpu_flops * a.train_mfu) / a.load)
    requests = a.daily_users * a.requests_per_user / DAY * a.peak
    serve = _serve_flops(config, a.history_items, a.beams)
    replicas = math.ceil(requests * serve / (a.gpu_flops * a.serve_mfu) / a.load)
    hosts = max(1, math.ceil(replicas / 8))
    cores = workers * 2 + ingests * 2 + brokers * 16
    disks = disk + 2 * a.kept_users * state
    month = 730 * (cores * a.core_hour + (ranks + replicas) * a.gpu_hour) + disks / 1e9 * a.disk_month
    return [
        ("events a day", daily, "", "daily users × events a user"),
        ("events/s at the peak", peak, "", "events a day / 86,400 × peak"),
        ("`onerec ingest` instances", ingests, "", "peak / (instance × load)"),
        ("`onerec stream` workers", workers, "", "peak / (worker × load)"),
        ("partitions", partitions, "", "the power of two from 4 × workers on: fixed for the life of a log"),
        ("users a worker", users, "", "kept users / workers"),
        ("RocksDB bytes a user, history full", state, "B", "measured × 256 / events a user in the soak, at least × 1"),
        ("RocksDB a worker", users * state, "B", "users a worker × bytes a user"),
        ("seconds to catch up one partition, disk lost", a.kept_users / partitions * 2 / 1e6 * found["recovery"], "s",
         "2 records a user × users a partition × seconds a million"),
        ("minutes to catch up a whole worker, disk lost", users * 2 / 1e6 * found["recovery"] / 60, "min",
         "2 records a user × users a worker; other workers share it where they take its partitions"),
        ("seconds to work off a stall of 60 s at the peak", 60 * a.load / (1 - a.load), "s", "60 × load / (1 − load)"),
        ("Kafka, written at the peak, copies included", traffic, "B/s", "peak × bytes an event × copies"),
        ("Kafka on disk", disk, "B", "copies × (7 days raw and `events`, 30 days `sessions`, state twice)"),
        ("Kafka brokers", brokers, "", "the larger of bytes/s / 200 MB/s and disk / 20 TB"),
        ("`histories` to each serving host that keeps all users", peak * found["histories_bytes"], "B/s",
         "peak × bytes an event"),
        ("RocksDB of such a host", a.kept_users * state, "B", "kept users × bytes a user"),
        (f"FLOP a training window, preset {PRESET}", train, "FLOP", "`step_flops` of benchmarks/train.py, 256 items"),
        ("training windows a second", windows, "", "daily users × sessions × good share × windows / 86,400"),
        ("trainer ranks (GPUs)", ranks, "", "windows × FLOP / (GPU × MFU × load)"),
        ("requests/s at the peak", requests, "", "daily users × requests a user / 86,400 × peak"),
        (f"FLOP a request, preset {PRESET}, {a.beams:.0f} beams", serve, "FLOP", "encoder once, beams × 20 decoder positions"),
        ("Triton replicas (GPUs)", replicas, "", "requests × FLOP / (GPU × MFU × load)"),
        ("serving hosts of 8 GPUs", hosts, "", "replicas / 8"),
        ("cores beside the GPUs", cores, "", "2 a worker and an instance, 16 a broker"),
        ("a month", month, "$", "730 h × (cores, GPUs) + disks"),
        ("of it GPUs", 730 * (ranks + replicas) * a.gpu_hour, "$", "730 h × GPUs"),
    ]


def tables(assumed: Assumed, figures: dict[str, Any]) -> str:
    """Three tables in Markdown."""
    rows = measured(figures)
    lines = ["### Measured", "", "| | value | command |", "|---|---:|---|"]
    lines += [f"| {unit} | {_text(value)} | {command} |" for _, value, unit, command in rows]
    lines += ["", "### Assumed", "", "| name | value | why |", "|---|---:|---|"]
    for field in dataclasses.fields(assumed):
        value, unit = getattr(assumed, field.name), field.metadata["unit"]
        lines.append(f"| `{field.name}` | {_text(value, unit)} | {field.metadata['why']} |")
    lines += ["", "### Computed", "", "| what | value | formula |", "|---|---:|---|"]
    found = {name: value for name, value, _, _ in rows}
    lines += [f"| {what} | {_text(value, unit)} | {formula} |" for what, value, unit, formula in plan(assumed, found)]
    return "\n".join(lines)


def main() -> None:
    """Prints or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=Path("docs/results-kafka.json"), help="of benchmarks.kafka --out")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="another assumption")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this file")
    options = parser.parse_args()
    given = {name: float(value) for name, _, value in (pair.partition("=") for pair in options.assume)}
    if unknown := set(given) - {field.name for field in dataclasses.fields(Assumed)}:
        parser.error(f"--assume {', '.join(sorted(unknown))}: known are "
                     + ", ".join(field.name for field in dataclasses.fields(Assumed)))
    text = tables(Assumed(**given), json.loads(options.figures.read_text()))
    if options.write:
        put_between(options.write, "benchmarks/capacity.py", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
