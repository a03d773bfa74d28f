"""What `select=reward` costs beside `likelihood`, and what the choice gains on the simulator, where the truth is known.

    python -m benchmarks.reward_selection [--users 1000] [--items 1000] [--days 7] [--seed 0] [--json] [--out FILE]

A world is simulated; the sessions of four users in five are replayed and learnt (generator and reward model, one pass each);
the run is published and served by Triton. Users that the models never saw are asked for with their histories, by both
choices: the true reward of the one session that comes back, and the truth of all beams beside it, are the world's own
(`World.true_rewards`, last day). Requests are timed in turn, in the engine and through Triton. Ends within four minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from exporter.client import Client
from exporter.publish import load_repository
from exporter.repository import Repository
from exporter.server import TritonServer
from serving_config.recommend.engine import Engine, Select, Sessions, Wanted
from simulator.world import World, WorldConfig
from streaming.store import Reader
from trainer.config import RewardConfig
from trainer.reward_weights import TARGETS, combine_array

HELD_OUT = 5
"""Every fifth user is kept from training."""
CHOICES: tuple[Select, Select] = ("likelihood", "reward")
CLIENTS = 8
WEIGHTS = RewardConfig()

Floats = NDArray[np.float64]


def onerec(*arguments: str | Path) -> dict[str, Any]:
    """Run a command of the project, say how long it took; the last line of its JSON."""
    command = [sys.executable, "-m", "onerec.cli", *map(str, arguments), "--json"]
    began = time.monotonic()
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.splitlines()
    sys.stderr.write(f"{arguments[0]}: {time.monotonic() - began:.0f} s\n")
    return orjson.loads(out[-1]) if out else {}


def held_out(user_id: str) -> bool:
    """Whether a user is kept from training."""
    return int(user_id[1:]) % HELD_OUT == 0


def learn(folder: Path, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Simulate, replay, train; FOLDER/run and FOLDER/state are what a publish needs. Returns the held-out histories."""
    log, part = folder / "events.jsonl", folder / "learnt.jsonl"
    onerec("simulate", "--out", log, "--users", str(arguments.users), "--items", str(arguments.items),
           "--days", str(arguments.days), "--seed", str(arguments.seed))  # fmt: skip
    with log.open("rb") as events, part.open("wb") as kept:
        kept.writelines(line for line in events if not held_out(orjson.loads(line).get("user_id", "u1")))
    items = folder / "events.items.jsonl"
    onerec("replay", part, "--items", items, "--state", folder / "state")
    onerec("replay", log, "--items", items, "--state", folder / "whole")
    onerec("items", "--state", folder / "state", "--set", "catalogue.codes=64")
    onerec("train", "--state", folder / "state", "--run", folder / "run", "--set", "train.score_share=0",
           "--set", f"train.backlog_passes={arguments.passes}", "--set", "train.learning_rate=1e-3",
           "--set", "preference.ratio=0")  # fmt: skip
    with Reader(folder / "whole") as reader:
        histories = {user: list(items) for user, items in reader.users() if held_out(user)}
    return {user: history for user, history in sorted(histories.items()) if history}


def truth(world: World, users: Sequence[str], sessions: Sequence[Sequence[str]]) -> Floats:
    """True swt, vtr, wtr, ltr [n, 4] of session n shown to user n on the last day."""
    rows = np.array([[world.item_index(item) for item in session] for session in sessions])
    reward = world.true_rewards(np.array([world.user_index(user) for user in users]), rows, world.config.days - 1)
    return np.stack([getattr(reward, name) for name in TARGETS], axis=1)


def combined(rewards: Floats) -> Floats:
    """One reward of four, as the bundle weighs them."""
    return combine_array(rewards, WEIGHTS).astype(np.float64)


def gains(client: Client, engine: Engine, world: World, histories: dict[str, list[str]]) -> dict[str, Any]:
    """True and modelled rewards of both choices, of the mean beam and of the best beam by the truth; a row a user."""
    users = list(histories)
    width = engine.manifest.width
    told = {
        select: [client.recommend(history=histories[user], select=select) for user in users] for select in CHOICES
    }
    true: dict[str, Floats] = {
        select: truth(world, users, [answer.items[0] for answer in told[select]]) for select in CHOICES
    }
    modelled = {select: np.array([answer.rewards[0] for answer in told[select] if answer.rewards]) for select in CHOICES}
    means, bests, agreement = [], [], []
    for user in users:
        beams = client.recommend(history=histories[user], count=width)
        assert beams.rewards is not None, "the version has no reward model"  # noqa: S101
        every = truth(world, [user] * width, beams.items)
        means.append(every.mean(0))
        bests.append(every[combined(every).argmax()])
        agreement.append(np.corrcoef(combined(every), combined(np.array(beams.rewards)))[0, 1])
    difference = combined(true["reward"]) - combined(true["likelihood"])
    compared: dict[str, Floats] = {**true, "mean beam": np.array(means), "best beam by truth": np.array(bests)}
    return {
        "users": len(users),
        "beams": width,
        "true": {name: _figures(values) for name, values in compared.items()},
        "modelled": {select: _figures(values) for select, values in modelled.items()},
        "gain": float(difference.mean()),
        "gain_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
        "gain_ratio": float(combined(true["reward"]).mean() / combined(true["likelihood"]).mean()),
        "better": float((difference > 1e-9).mean()),
        "worse": float((difference < -1e-9).mean()),
        "same": float((np.abs(difference) <= 1e-9).mean()),
        "correlation_within_beams": float(np.nanmean(agreement)),
    }


def _figures(rewards: Floats) -> dict[str, float]:
    figures = {name: float(value) for name, value in zip(TARGETS, rewards.mean(0), strict=True)}
    return {**figures, "R": float(combined(rewards).mean())}


def costs(client: Client, engine: Engine, histories: Sequence[list[str]]) -> dict[str, Any]:
    """Milliseconds a request of both choices in turn, and of the search alone; requests a second of eight clients.

    `cpu_ms` is the processor time of this process, so of the engine only; it says more where the machine is not quiet.
    """
    codes = [engine.history(history).codes for history in histories]

    def by_engine(select: Select) -> Callable[[int], object]:
        return lambda place: _sound(engine.answer([Wanted(history=codes[place], select=select)])[0])

    def by_triton(select: Select) -> Callable[[int], object]:
        return lambda place: client.recommend(history=histories[place], select=select)

    ways: dict[str, Callable[[int], object]] = {"search alone": lambda place: engine.search([codes[place]])}
    ways |= {f"engine, {select}": by_engine(select) for select in CHOICES}
    ways |= {f"Triton, {select}": by_triton(select) for select in CHOICES}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for place in range(len(histories)):
        for name, way in ways.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            way(place)
            if place >= 3:  # the first calls allocate
                seconds[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - began_cpu)
    rates: dict[str, list[float]] = {select: [] for select in CHOICES}
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(3):
            for select in CHOICES:
                began = time.perf_counter()
                list(pool.map(by_triton(select), range(len(histories))))
                rates[select].append(len(histories) / (time.perf_counter() - began))
    ms = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    cpu_ms = {name: statistics.median(values) * 1e3 for name, values in processor.items() if not name.startswith("Triton")}
    rate = {select: statistics.median(values) for select, values in rates.items()}
    return {
        "ms": ms,
        "cpu_ms": cpu_ms,
        "rewards_of_likelihood": cpu_ms["engine, likelihood"] / cpu_ms["search alone"],
        "engine_cpu": cpu_ms["engine, reward"] / cpu_ms["engine, likelihood"],
        "engine": ms["engine, reward"] / ms["engine, likelihood"],
        "triton": ms["Triton, reward"] / ms["Triton, likelihood"],
        "requests_per_second": rate,
        "throughput": rate["reward"] / rate["likelihood"],
    }


def _sound(answer: object) -> Sessions:
    if not isinstance(answer, Sessions):
        raise RuntimeError(f"the engine refused: {answer}")
    return answer


def lines(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    gain, cost = found["gain"], found["cost"]
    text = [
        f"`python -m benchmarks.reward_selection {found['arguments']}`: {found['world']}; {gain['beams']} beams, "
        f"{gain['users']} users that no model saw; {found['seconds']:.0f} s in all.",
        "",
        "| session of | true R | " + " | ".join(TARGETS) + " | modelled R |",
        "|---|--:|" + "--:|" * len(TARGETS) + "--:|",
    ]
    for name, figures in gain["true"].items():
        modelled = f"{gain['modelled'][name]['R']:.4f}" if name in gain["modelled"] else "–"
        towers = " | ".join(f"{figures[target]:.4f}" for target in TARGETS)
        text.append(f"| {name} | {figures['R']:.4f} | {towers} | {modelled} |")
    text += [
        "",
        f"Choosing by reward gains {gain['gain']:+.4f} ± {gain['gain_error']:.4f} (standard error over users) of true reward, "
        f"{gain['gain_ratio']:.3f}×; the session is truly better for {gain['better']:.0%} of the users, worse for "
        f"{gain['worse']:.0%}, the same for {gain['same']:.0%}. Within a user's beams modelled and true reward correlate "
        f"by {gain['correlation_within_beams']:.2f}.",
        "",
        "| a request, median ms | likelihood | reward | ratio |",
        "|---|--:|--:|--:|",
        *(
            f"| {where} | {cost['ms'][f'{where}, likelihood']:.1f} | {cost['ms'][f'{where}, reward']:.1f} | {cost[key]:.3f}× |"
            for where, key in (("engine", "engine"), ("Triton", "triton"))
        ),
        "| engine, processor time | {:.1f} | {:.1f} | {:.3f}× |".format(
            *(cost["cpu_ms"][f"engine, {select}"] for select in CHOICES), cost["engine_cpu"]
        ),
        "| Triton, {} clients, requests/s | {:.1f} | {:.1f} | {:.3f}× |".format(
            CLIENTS, *(cost["requests_per_second"][select] for select in CHOICES), cost["throughput"]
        ),
        "",
        f"With the rewards of its one session `likelihood` takes {cost['rewards_of_likelihood']:.3f}× the processor time of "
        f"the search alone ({cost['cpu_ms']['search alone']:.1f} ms).",
    ]
    return "\n".join(text) + "\n"


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one world."""
    began = time.monotonic()
    histories = learn(folder, arguments)
    repository = folder / "repository"
    onerec("publish", "--run", folder / "run", "--repository", repository)
    place = Repository(repository)
    engine = Engine(place.folder(place.versions()[-1]))
    config = WorldConfig(users=arguments.users, items=arguments.items, days=arguments.days, seed=arguments.seed)
    chosen = dict(list(histories.items())[: arguments.ask])
    with TritonServer(repository, None) as server, Client(server.url, timeout=60) as client:
        load_repository(repository, client)
        gain = gains(client, engine, World(config), chosen)
        cost = costs(client, engine, list(chosen.values())[: arguments.requests])
    return {
        "arguments": " ".join(sys.argv[1:]),
        "world": f"{config.users} users, {config.items} items, {config.days} days, seed {config.seed}",
        "gain": gain,
        "cost": cost,
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--passes", type=int, default=1, help="how often the log is learnt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ask", type=int, default=200, help="held-out users that are asked for")
    parser.add_argument("--requests", type=int, default=60, help="requests that are timed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--out", type=Path, help="Markdown file to write the lines to as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), arguments)
    if arguments.out:
        arguments.out.write_text("# Choosing by reward\n\n" + lines(found), encoding="utf-8")
    print(json.dumps(found) if arguments.json else lines(found))


if __name__ == "__main__":
    main()
