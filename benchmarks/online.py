"""Whether learning without end pays on a world whose tastes drift and whose items come and go: a plot by day and its JSON.

    python -m benchmarks.online [--quick] [--seeds N] [--work DIR] [--out DIR]

All begin with one model that has learnt day 1. `continuous` learns each session once, after it was scored; `daily` learns
at midnight what the day brought, once; `retrained` is made anew at midnight from all sessions so far; `frozen` stays. All
are asked for the same sessions, with the items there are that day: hit rate of the next item, and the true expected watch
time of the session that each would have shown.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from benchmarks.markers import put_between
from benchmarks.seed_models import (
    DOCUMENT,
    FIGURES,
    Floats,
    Say,
    learn_batch,
    new_model,
    parser_of,
    pyplot_agg,
    teller,
    write_json,
)
from onerec.config import Config
from simulator.log import write_world
from simulator.world import DAY_MS, SWT_CAP_MS, World, WorldConfig
from streaming.item_files import read_items
from streaming.replay import Replay
from streaming.semantics import HistoryConfig
from streaming.store import Reader, Store
from streaming.windows import windows
from trainer.config import CatalogueConfig
from trainer.data import Example, known_rows, session_examples
from trainer.evaluate import RANKED, is_scored, rank_scores
from trainer.items import Catalogue, build_catalogue
from trainer.judge import Case, OneRecRecommender, RewardFunction, true_rewards
from trainer.model import OneRec
from trainer.optim import Optimizer
from trainer.presets import preset

ARMS = ("continuous", "daily", "retrained", "frozen")
COLOURS = {"continuous": "tab:red", "daily": "tab:orange", "retrained": "tab:blue", "frozen": "tab:gray"}
LABELS = {"continuous": "continuous: each session once, as it ends", "daily": "daily: each session once, at midnight",
          "retrained": "retrained at midnight from scratch", "frozen": "frozen after day 1"}


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the figures but the seed. `passes`: over day 1 by all, over all days so far by `retrained`.

    `width`: beams of the search for the shown session; `share` of the sessions are test cases.
    """

    world: WorldConfig
    config: Config = Config(history=HistoryConfig(length=64), catalogue=CatalogueConfig(levels=3, codes=64))
    passes: int = 3
    learning_rate: float = 1e-3
    batch_windows: int = 32
    width: int = 8
    share: float = 1.0


FULL = Setting(world=WorldConfig(users=700, items=800, days=6))
QUICK = Setting(world=WorldConfig(users=200, items=300, days=4), passes=2)
TRIAL = Setting(
    world=WorldConfig(users=60, items=120, days=3),
    config=Config(history=HistoryConfig(length=16), catalogue=CatalogueConfig(levels=3, codes=16)),
    passes=1, width=4, share=0.5,
)
"""For tests."""


class Heard(NamedTuple):
    """A session of the log: its windows, the day it ended, and the case that it makes, None for one not scored."""

    examples: list[Example]
    day: int
    case: Case | None


class Stream(NamedTuple):
    """A seed's log in commit order; the catalogue's rows are in order of arrival, `known[day]` of them by the end of it."""

    sessions: list[Heard]
    catalogue: Catalogue
    known: list[int]
    m: int
    truth: RewardFunction
    start_ms: int

    def day_of(self, ts: int) -> int:
        """Day of an event time, 0 is the first."""
        return int((ts - self.start_ms) // DAY_MS)


def make_stream(setting: Setting, seed: int, folder: Path, say: Say) -> Stream:
    """A world replayed; the codebook knows day 1 alone, later items get their codes from it as they arrive."""
    world = World(msgspec.structs.replace(setting.world, seed=seed))
    events, items, state = folder / "events.jsonl", folder / "items.jsonl", folder / "state"
    say(f"seed {seed}: {world.config.users:,} users, {world.config.items:,} items, {world.config.days} days")
    folder.mkdir(parents=True)
    write_world(world, events, items)
    with Store(state, setting.config.semantics) as store:
        for batch in read_items(str(items), [], None):
            store.put_items(batch)
        Replay(store, [str(events)], wanted="jsonl").run()
    with Reader(state) as reader:
        catalogue = build_catalogue(state, reader, setting.config, until=world.config.start_ms + DAY_MS)
        uploads = np.array([world.upload_ms[world.item_index(item_id)] for item_id in catalogue.item_ids])
        ends = world.config.start_ms + DAY_MS * np.arange(1, world.config.days + 1)
        stream = Stream([], catalogue, [int((uploads < end).sum()) for end in ends], reader.semantics().session.target_items,
                        true_rewards(world, catalogue.item_ids), world.config.start_ms)
        n = reader.semantics().history.length
        for _, session in reader.sessions():
            if not session.high_quality:
                continue
            examples = session_examples(session, catalogue.index, len(catalogue.item_ids), m=stream.m, n=n, fresh=True,
                                        counts=Counter())
            day = min(stream.day_of(session.end), world.config.days - 1)
            case = None
            if stream.day_of(session.start) > 0 and is_scored(session.session_id, setting.share):
                window, known = windows(session, stream.m, n)[0], stream.known[stream.day_of(session.start)]
                targets = known_rows(window.items, catalogue.index, known)
                if len(targets):
                    history = known_rows(window.history, catalogue.index, known)
                    case = Case(session.user_id, session.start, history, targets)
            if examples:
                stream.sessions.append(Heard(examples, day, case))
    return stream


class Learner:
    """A model with its optimiser, and how long it has learnt."""

    def __init__(self, model: OneRec, learning_rate: float) -> None:
        self.optimizer = Optimizer(model, learning_rate=learning_rate)
        self.seconds = 0.0

    @property
    def model(self) -> OneRec:
        """What is scored."""
        return self.optimizer.model

    def learn(self, sessions: Sequence[Heard], item_codes: np.ndarray, size: int) -> None:
        """One pass in order, batches of whole sessions, at least `size` windows each."""
        for group in batches(sessions, size):
            self.learn_one(group, item_codes)

    def learn_one(self, group: Sequence[Heard], item_codes: np.ndarray) -> None:
        """One step."""
        began = time.perf_counter()
        learn_batch(self.optimizer, [example for heard in group for example in heard.examples], item_codes)
        self.seconds += time.perf_counter() - began


def batches(sessions: Sequence[Heard], size: int) -> list[list[Heard]]:
    """Whole consecutive sessions, at least `size` windows a batch but the last; a batch ends where a day does."""
    found: list[list[Heard]] = []
    count = size
    for heard in sessions:
        if count >= size or heard.day != found[-1][-1].day:
            found.append([])
            count = 0
        found[-1].append(heard)
        count += len(heard.examples)
    return found


class Judge:
    """Scores of cases: by arm and day, a row (HR@10, true watch time of the shown session in s) a case."""

    def __init__(self, stream: Stream, width: int) -> None:
        self._stream, self._width = stream, width
        self.scores: dict[tuple[str, int], list[tuple[float, float]]] = {}

    def score(self, arm: str, model: OneRec, cases: Sequence[Case]) -> None:
        """Ask `model` what it would show, with the items of each case's day."""
        stream = self._stream
        for day in sorted({stream.day_of(case.ts) for case in cases}):
            mine = [case for case in cases if stream.day_of(case.ts) == day]
            recommender = OneRecRecommender(model, stream.catalogue.item_codes[: stream.known[day]])
            answers = zip(mine, recommender.items(mine, RANKED), recommender.sessions(mine, self._width), strict=True)
            for case, ranked, sessions in answers:
                hit = rank_scores(ranked.tolist(), int(case.targets[0]))["hit@10"]
                watched = float(stream.truth(case, sessions[:1])[0, 0]) * SWT_CAP_MS / 1000
                self.scores.setdefault((arm, day), []).append((hit, watched))


def compare(stream: Stream, setting: Setting, seed: int, say: Say) -> tuple[Judge, dict[str, float]]:
    """All arms over a stream: scores, and seconds of learning after day 1 (the first model's are common to all)."""
    codes, judge = stream.catalogue.item_codes, Judge(stream, setting.width)
    days = sorted({heard.day for heard in stream.sessions})
    by_day = {day: [heard for heard in stream.sessions if heard.day == day] for day in days}

    def from_scratch(last: int) -> Learner:
        learner = Learner(
            new_model(preset("tiny", levels=stream.catalogue.levels, codes=stream.catalogue.codes, session_items=stream.m,
                             history_length=setting.config.history.length), seed),
            setting.learning_rate,
        )
        for _ in range(setting.passes):
            learner.learn([heard for heard in stream.sessions if heard.day <= last], codes, setting.batch_windows)
        return learner

    arms = {arm: from_scratch(0) for arm in ("continuous", "daily")}
    frozen = retrained = from_scratch(0)
    spent = {"retrained": 0.0, "frozen": 0.0, **{arm: -learner.seconds for arm, learner in arms.items()}}
    for day in days[1:]:
        cases = [heard.case for heard in by_day[day] if heard.case is not None]
        if day > 1:
            retrained = from_scratch(day - 1)
            spent["retrained"] += retrained.seconds
        for name, model in (("frozen", frozen.model), ("retrained", retrained.model), ("daily", arms["daily"].model)):
            judge.score(name, model, cases)
        for group in batches(by_day[day], setting.batch_windows):
            judge.score("continuous", arms["continuous"].model, [heard.case for heard in group if heard.case is not None])
            arms["continuous"].learn_one(group, codes)
        arms["daily"].learn(by_day[day], codes, setting.batch_windows)
        say(f"seed {seed}, day {day + 1}: " + "; ".join(
            f"{arm} HR@10 {hit:.3f}, {watched:.1f} s" for arm in ARMS
            for hit, watched in [np.mean(judge.scores[arm, day], axis=0)]
        ))
    for arm, learner in arms.items():
        spent[arm] += learner.seconds
    return judge, spent


def measure(setting: Setting, seeds: int, work: Path, say: Say) -> dict[str, Any]:
    """Means by arm and day over all seeds' cases, with standard errors; differences to `continuous` are paired."""
    scores: dict[tuple[str, int], list[Floats]] = {}
    spent: Counter[str] = Counter()
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            judge, seconds = compare(make_stream(setting, seed, Path(folder) / "log", say), setting, seed, say)
        spent.update(seconds)
        for key, rows in judge.scores.items():
            scores.setdefault(key, []).append(np.array(rows))
    days = sorted({day for _, day in scores})
    joined = {key: np.concatenate(parts) for key, parts in scores.items()}
    whole = {arm: np.concatenate([joined[arm, day] for day in days]) for arm in ARMS}
    return {
        "figure": "online", "setting": msgspec.to_builtins(setting), "seeds": seeds, "days": [day + 1 for day in days],
        "cases": [len(joined["frozen", day]) for day in days],
        "arms": {
            arm: {
                "hr@10": [joined[arm, day][:, 0].mean() for day in days],
                "hr_error": [_error(joined[arm, day][:, 0]) for day in days],
                "watch_s": [joined[arm, day][:, 1].mean() for day in days],
                "watch_error": [_error(joined[arm, day][:, 1]) for day in days],
                "all": whole[arm].mean(axis=0).tolist(),
                "continuous_minus_this": (whole["continuous"] - whole[arm]).mean(axis=0).tolist(),
                "difference_error": [_error(column) for column in (whole["continuous"] - whole[arm]).T],
                "learning_s": spent[arm],
            }
            for arm in ARMS
        },
    }


def _error(values: Floats) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def draw(record: dict[str, Any], path: Path) -> None:
    """Hit rate and watch time by day, a line an arm."""
    pyplot = pyplot_agg()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for axis, name, error, label in (
        (axes[0], "hr@10", "hr_error", "HR@10 of the next item"),
        (axes[1], "watch_s", "watch_error", "true watch time of the shown session, s"),
    ):
        for place, arm in enumerate(ARMS):
            values = record["arms"][arm]
            apart = np.array(record["days"]) + 0.05 * (place - 1.5)
            axis.errorbar(apart, values[name], yerr=values[error], marker="o", markersize=4, capsize=2,
                          color=COLOURS[arm], label=LABELS[arm])
        axis.set_xlabel("day of the stream (bars: standard error)")
        axis.set_ylabel(label)
        axis.set_xticks(record["days"])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=len(ARMS), frameon=False, fontsize=8)
    figure.suptitle(f"A drifting world, scored before it is learnt ({sum(record['cases']):,} sessions)", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(record: dict[str, Any]) -> str:
    """Days and means as Markdown."""
    days = " | ".join(f"day {day}" for day in record["days"])
    rows = [f"| HR@10 / true watch time, s | {days} | all | continuous is better by | learning, s |",
            f"|---|{'---|' * len(record['days'])}---|---|---:|"]
    for arm in ARMS:
        values = record["arms"][arm]
        by_day = zip(values["hr@10"], values["watch_s"], strict=True)
        cells = " | ".join(f"{hit:.3f} / {watched:.1f}" for hit, watched in by_day)
        (hit, watched), (hit_error, watch_error) = values["continuous_minus_this"], values["difference_error"]
        better = "–" if arm == "continuous" else f"{hit:+.3f} ± {hit_error:.3f} / {watched:+.1f} ± {watch_error:.1f}"
        rows.append(f"| {arm} | {cells} | {values['all'][0]:.3f} / {values['all'][1]:.1f} | {better} | "
                    f"{values['learning_s']:.0f} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, write JSON and plot, print the table."""
    options = parser_of(__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        record = measure(QUICK if options.quick else FULL, options.seeds, work, teller())
    out = options.out or FIGURES
    write_json(out / "online.json", record)
    draw(record, out / "online.png")
    print(table(record))
    if options.out is None:
        put_between(DOCUMENT, "benchmarks.online", table(record))


if __name__ == "__main__":
    main()
