"""The tables of docs/results-kafka.md, computed from what `benchmarks.kafka --out` wrote, goals beside what was measured.

    python -m benchmarks.kafka_tables --figures docs/results-kafka.json                               # prints them
    python -m benchmarks.kafka_tables --figures docs/results-kafka.json --write docs/results-kafka.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.markers import put_between

ENGINES: Final = {"faust": "Faust", "group": "plain group"}
INGEST, STREAM, TWO, FAUST_TIMES, QUIX_TIMES, HISTORY, SESSION = 100_000, 80_000, 1.7, 20, 2, 1.0, 2.0


def _goal(value: float, goal: float, text: str, *, least: bool = True) -> str:
    met = value >= goal if least else value <= goal
    return f"{'≥' if least else '≤'} {text}: {'met' if met else '**not met**'}"


def throughput(found: dict[str, Any]) -> Iterator[str]:
    """Events a second: our commands, the bare machine, peers, and two workers."""
    streams = found["stream"]
    best = max(streams.values(), key=lambda each: each["rate"])["rate"]
    yield f"{found['log_events']:,} events, {found['partitions']} partitions; median of the rounds.\n"
    yield "| | events/s | events a CPU second | goal |"
    yield "|---|---:|---:|---|"
    for pack, each in found["ingest"].items():
        lines = "one line" if pack == "1" else f"{pack} lines"
        yield (f"| `onerec ingest`, {lines} a raw message | {each['rate']:,.0f} | {each['per_cpu_second']:,.0f} | "
               f"{_goal(each['rate'], INGEST, f'{INGEST:,}')} |")
    for engine, each in streams.items():
        rounds = ", ".join(f"{rate / 1000:,.1f} k" for rate in each["rates"])
        yield (f"| `onerec stream`, one worker, {ENGINES[engine]} ({rounds}) | {each['rate']:,.0f} | "
               f"{each['per_cpu_second']:,.0f} | {_goal(each['rate'], STREAM, f'{STREAM:,}')} |")
    for pack, rate in found["produce"].items():
        yield f"| `onerec produce --pack {pack}`, the whole command | {rate:,.0f} | | |"
    yield (f"| embedded `replay` of the same log, one core, no Kafka | {found['embedded']['rate']:,.0f} | "
           f"{found['embedded']['events'] / found['embedded']['cpu']:,.0f} | the faster stream is "
           f"{best / found['embedded']['rate']:.2f}× |")
    yield (f"| bare loop: consume `events`, `orjson.loads`, a WriteBatch per 5,000 | {found['bare']['rate']:,.0f} | "
           f"{found['bare']['events'] / found['bare']['cpu']:,.0f} | {best / found['bare']['rate']:.2f}× |")
    yield "\n| peer, in the same run | events/s | stream, Faust engine, is | stream, plain group, is | goal |"
    yield "|---|---:|---:|---:|---|"
    for name, each in found["peers"].items():
        times = [f"{streams[engine]['rate'] / each['rate']:.1f}×" if engine in streams else "" for engine in ENGINES]
        goal = FAUST_TIMES if name.startswith("Faust") else QUIX_TIMES
        yield (f"| {name} ({each['events']:,} events, {each['sessions']:,} sessions) | {each['rate']:,.0f} | {times[0]} | "
               f"{times[1]} | {_goal(best / each['rate'], goal, f'{goal}×')} |")
    if "scale" not in found:
        return
    yield "\n| engine | one worker | two workers | | one worker and broker on one core | two of both, to that |"
    yield "|---|---:|---:|---|---:|---|"
    for engine, each in found["scale"].items():
        one, two = each["1"]["inner_rate"], each["2"]["inner_rate"]
        half = each["1 worker and broker on one core"]["inner_rate"]
        yield (f"| {ENGINES[engine]} | {one:,.0f} | {two:,.0f} | {two / one:.2f}×, {_goal(two / one, TWO, f'{TWO}×')} | "
               f"{half:,.0f} | {two / half:.2f}×, {_goal(two / half, TWO, f'{TWO}×')} |")


def latency(found: dict[str, Any]) -> Iterator[str]:
    """Seconds, and who used the cores meanwhile."""
    yield f"{found['rate']:,} events/s, {found['seconds']:.0f} s after a warm-up, {found['pack']} event a raw message.\n"
    yield "| engine | trainer | event → | seen | p50 | p95 | p99 | goal for p95 |"
    yield "|---|---|---|---:|---:|---:|---:|---|"
    for each in found["rounds"]:
        for name, goal in (("history", HISTORY), ("session", SESSION)):
            values = each[name]
            text = "stated" if each["trainer"] else _goal(values["p95"], goal, f"{goal:.0f} s", least=False)
            yield (f"| {ENGINES[each['engine']]} | {'on' if each['trainer'] else 'off'} | {name} | {values['count']:,} | "
                   f"{values['p50']:.2f} | {values['p95']:.2f} | {values['p99']:.2f} | {text} |")
    yield ""
    for each in found["rounds"]:
        cores = ", ".join(f"{name} {used:.2f}" for name, used in each["cpu_cores"].items())
        yield (f"- {ENGINES[each['engine']]}, trainer {'on' if each['trainer'] else 'off'}: cores used: {cores}; the producer "
               f"was behind its own pace by {each['sent']['behind_ms']} ms at worst.")


def soak(found: dict[str, Any], recoveries: list[dict[str, Any]]) -> Iterator[str]:
    """Memory, lag, state and recovery."""
    yield f"{found['events']:,} events at {found['rate']:,}/s, {found['users']:,} users, engine {ENGINES[found['engine']]}.\n"
    yield "| resident MiB after | " + " | ".join(found["resident_mb"]["stream"]) + " |"
    yield "|---|" + "---:|" * len(found["resident_mb"]["stream"])
    for name, values in found["resident_mb"].items():
        yield f"| `onerec {name}` | " + " | ".join(f"{value:,.0f}" for value in values.values()) + " |"
    back = found["lag_back_after_seconds"]
    yield "\n| | |"
    yield "|---|---:|"
    yield f"| events applied, of {found['events']:,} | {found['applied']:,} |"
    yield f"| messages behind, at most before the stall / at the end of it | {found['lag_before']:,} / {found['lag_worst']:,} |"
    yield f"| first commit after a freeze of {found['stall_seconds']:.0f} s | {found['first_commit_after_seconds']} s |"
    yield f"| lag back | {'**never**' if back is None else f'after {back} s'} |"
    yield f"| events/s while it caught up, traffic going on | {found['events_per_second_behind'] or 0:,} |"
    yield f"| RocksDB of the worker, a user | {found['state_bytes_per_user']:,} B |"
    for name, size in found.get("topic_bytes_per_event", {}).items():
        yield f"| `{name}` on the broker's disk, an event | {size:,.0f} B |"
    rounds = [found["recovery"], *recoveries]
    seconds = ", ".join(f"{each['seconds_per_million']:.1f}" for each in rounds)
    bare = statistics.median(each["bare_read_seconds_per_million"] for each in rounds)
    records = ", ".join(f"{each['records']:,}" for each in rounds)
    yield f"| an empty disk caught up from {records} changelog records, seconds a million | {seconds} |"
    yield f"| a bare read of them, seconds a million | {bare:.1f} |"


def tables(figures: dict[str, Any]) -> str:
    """All of it in Markdown."""
    more = figures.get("recovery", {}).get("rounds", [])
    parts = {"throughput": throughput, "latency": latency, "soak": lambda found: soak(found, more)}
    titles = {"throughput": "Events a second", "latency": "Seconds", "soak": "Ten million events, a stall, recovery"}
    return "\n\n".join(
        f"### {titles[name]}\n\n" + "\n".join(table(figures[name])) for name, table in parts.items() if name in figures
    )


def main() -> None:
    """Prints or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=Path("docs/results-kafka.json"), help="of benchmarks.kafka --out")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this file")
    options = parser.parse_args()
    text = tables(json.loads(options.figures.read_text()))
    if options.write:
        put_between(options.write, "benchmarks/kafka_tables.py", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
