"""Table 1 of the paper over our own data: every method, several seeds, one line each, resumable (§5.2).

FOLDER/table.json says what the comparison is made of, FOLDER/lines.jsonl has a line a method and seed as they end,
FOLDER/seed-S the data of a seed with what was trained on it. A seed decides the world, the codes, every model's first
weights and the test cases, so deviations are over all of these; methods of one seed share them and compare in pairs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from onerec.config import Config
from onerec.errors import OneRecError, UserError
from simulator.world import World, WorldConfig
from streaming.semantics import HistoryConfig, SessionConfig
from streaming.store import Reader
from trainer.config import CatalogueConfig, RewardModelConfig
from trainer.items import Catalogue
from trainer.judge import Judgement, judge, modelled_rewards, true_rewards
from trainer.methods import METHODS, PARTS, Alignment, RankerSettings, Reinforcement, Settings, Task, load_reward_model
from trainer.reward_training import RewardTraining
from trainer.table_data import (
    Data,
    item_facts,
    kuairand_files,
    open_catalogue,
    prepare_kuairand,
    prepare_world,
    test_cases,
    train_state,
    training_examples,
)

LINES_FILE = "lines.jsonl"
SETTINGS_FILE = "table.json"


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides the figures but the seed. `world.seed` is replaced by each seed; None: the log in `kuairand`."""

    world: WorldConfig | None
    settings: Settings = Settings()
    config: Config = Config()
    kuairand: str | None = None


QUICK = Comparison(
    world=WorldConfig(users=800, items=1_500, days=6),
    settings=Settings(cases=150, ranker=RankerSettings(epochs=20, patience=3)),
    config=Config(history=HistoryConfig(length=64), catalogue=CatalogueConfig(levels=2, codes=128)),
)
"""What `onerec table --quick` runs: `tiny`, W = N = 32."""

FULL = msgspec.structs.replace(
    QUICK,
    world=WorldConfig(users=3_000, items=3_000, days=7),
    settings=Settings(width=128, cases=400, ranker=RankerSettings(epochs=60, patience=4)),
)
"""What `onerec table` runs: a larger world, W = N = 128 as in the paper."""

TRIAL = Comparison(
    world=WorldConfig(users=60, items=150, days=3),
    config=Config(catalogue=CatalogueConfig(levels=2, codes=16)),
    settings=Settings(
        width=8, cases=12, passes=1, tiger_passes=1, preset="tiny",
        ranker=RankerSettings(epochs=1, length=20),
        reward_model=RewardModelConfig(dimension=16, heads=2, hidden=16, buckets=64, history_length=16),
        reward_training=RewardTraining(epochs=1),
        alignment=Alignment(share=0.3, snapshots=2, ratio=0.3, min_margin=0.0),
        reinforcement=Reinforcement(steps=2, users=4, group=4, updates=1),
    ),
)
"""About a hundred sessions and an epoch of everything: shows that every method runs, not what it is worth."""


def kuairand_comparison(log: Path, *, quick: bool) -> Comparison:
    """The KuaiRand log, its last day for testing; sessions by a gap of 12 h with the thresholds of SEMANTICS.md §6.

    Raises UserError where the folder holds no such log.
    """
    kuairand_files(log)
    session = SessionConfig(gap_ms=43_200_000, min_watched=3, min_total_watch_ms=30_000, min_interactions=0)
    return Comparison(
        world=None,
        kuairand=str(log),
        settings=msgspec.structs.replace(
            (QUICK if quick else FULL).settings, passes=2, tiger_passes=2, batch_windows=16
        ),
        config=Config(session=session, catalogue=CatalogueConfig(levels=2, codes=1024)),
    )


class Line(NamedTuple):
    """One method of one seed, as `--json` prints it."""

    method: str
    seed: int
    values: dict[str, Any]


class Report(NamedTuple):
    """The lines there are, in the order of the table, and what failed: (method, seed, reason)."""

    lines: list[Line]
    failures: list[tuple[str, int, str]]


def run_table(
    folder: Path,
    comparison: Comparison,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    jobs: int = 1,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[Line, bool], None] = lambda line, fresh: None,
) -> Report:
    """Every method of every seed that has no line in `folder` yet, `jobs` processes of one thread each at a time.

    A method that fails is reported, its line is missing, and the next call tries it again. `progress(line, fresh)` hears
    of the lines that are there already, then of each that ends. Raises UserError for an unknown method, and for a folder
    made with other settings.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise UserError(f"unknown method {unknown[0]!r}: choose among {', '.join(METHODS)}")
    _settle(folder, comparison)
    found = {(line.method, line.seed): line for line in read_lines(folder)}
    wanted = [(name, seed) for seed in seeds for name in METHODS if name in methods]
    for key in wanted:
        if key in found:
            progress(found[key], False)
    jobs_left = _jobs([key for key in wanted if key not in found])
    failures: list[tuple[str, int, str]] = []

    def ended(job: _Job, result: Line | None, reason: str | None) -> None:
        if reason is not None:
            failures.append((job.method, job.seed, reason))
            say(f"{job.method}, seed {job.seed}: {reason}")
        elif result is not None:
            _append(folder, result)
            found[result.method, result.seed] = result
            progress(result, True)

    _schedule(folder, comparison, jobs_left, jobs, say, ended)
    return Report([found[key] for key in wanted if key in found], failures)


class _Job(NamedTuple):
    """A method, or what methods need: `data`, then the parts. All methods need the reward model, as they are judged."""

    method: str
    seed: int

    def needs(self) -> list[str]:
        if self.method == "data":
            return []
        return ["data"] if self.method in PARTS else ["data", "reward-model", *METHODS[self.method].needs]


def _jobs(missing: list[tuple[str, int]]) -> list[_Job]:
    """The jobs for lines that are missing, what others wait for first."""
    found: list[_Job] = []
    for seed in dict.fromkeys(seed for _, seed in missing):
        jobs = [_Job(name, of) for name, of in missing if of == seed]
        needed = {need for job in jobs for need in job.needs()}
        found += [*(_Job(name, seed) for name in ("data", *PARTS) if name in needed), *jobs]
    return found


def _schedule(
    folder: Path, comparison: Comparison, waiting: list[_Job], jobs: int, say: Callable[[str], None],
    ended: Callable[[_Job, Line | None, str | None], None],
) -> None:
    """Run the jobs, at most `jobs` at once, each when all that it needs is done; one whose need failed fails too."""
    done: set[_Job] = set()
    failed: set[_Job] = set()
    pending = set(waiting)

    def close(job: _Job, result: Line | None, reason: str | None) -> None:
        (failed if reason is not None else done).add(job)
        ended(job, result, reason)

    def ready() -> _Job | None:
        for job in list(waiting):
            needs = [need for name in job.needs() if (need := _Job(name, job.seed)) in pending]
            broken = next((need for need in needs if need in failed), None)
            if broken is not None:
                waiting.remove(job)
                close(job, None, f"needs {broken.method}, which failed")
            elif all(need in done for need in needs):
                waiting.remove(job)
                return job
        return None

    if jobs == 1:
        while (job := ready()) is not None:
            say(f"{job.method}, seed {job.seed}")
            try:
                close(job, _run(folder, comparison, job, say), None)
            except Exception as error:
                close(job, None, _reason(error))
        return
    import multiprocessing

    # Spawned: a fork of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[Line | None], _Job] = {}
        try:
            while True:
                while len(running) < jobs and (job := ready()) is not None:
                    say(f"{job.method}, seed {job.seed}")
                    running[_submit(pool, folder, comparison, job)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    fault = future.exception()
                    job = running.pop(future)
                    close(job, None if fault else future.result(), _reason(fault) if fault else None)
        except BaseException:
            for process in list((pool._processes or {}).values()):  # noqa: SLF001
                process.terminate()
            raise


def _submit(pool: Executor, folder: Path, comparison: Comparison, job: _Job) -> Future[Line | None]:
    return pool.submit(_run, folder, comparison, job)


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, OneRecError) else f"{type(error).__name__}: {error}"


def _run(
    folder: Path, comparison: Comparison, job: _Job, say: Callable[[str], None] = lambda text: None
) -> Line | None:
    """One job in this process, on one thread, so that the figures do not depend on the number of jobs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run_here(folder, comparison, job, say)
    finally:
        torch.set_num_threads(before)


def _run_here(folder: Path, comparison: Comparison, job: _Job, say: Callable[[str], None]) -> Line | None:
    place = _seed_folder(folder, job.seed)
    data = _prepare(place, comparison, job.seed, say)
    if job.method == "data":
        return None
    record = place / f"{job.method}.json"
    if record.exists():
        return None
    task = _task(place, comparison, job.seed, say)
    began = time.perf_counter()
    if job.method in PARTS:
        notes = PARTS[job.method](task)
        record.write_bytes(msgspec.json.encode({"seconds": time.perf_counter() - began, **notes}))
        return None
    trained = METHODS[job.method].train(task)
    seconds = time.perf_counter() - began
    parts = {name: msgspec.json.decode((place / f"{name}.json").read_bytes()) for name in METHODS[job.method].needs}
    judging = time.perf_counter()
    settings, catalogue = comparison.settings, task.catalogue
    cases = test_cases(place, data, catalogue, count=settings.cases, seed=job.seed)
    with Reader(task.state) as reader:
        facts = item_facts(reader, catalogue)
    judge_model = load_reward_model(place)
    judgement = judge(
        trained.recommender,
        cases,
        facts,
        width=settings.width,
        reward=modelled_rewards(judge_model, catalogue.item_codes, history_length=judge_model.config.history_length),
        truth=None if data.world is None else true_rewards(World(data.world), catalogue.item_ids),
    )
    return _line(
        job, judgement, own_seconds=seconds, part_seconds=sum(part["seconds"] for part in parts.values()),
        judge_seconds=time.perf_counter() - judging, notes={**parts, **trained.notes},
    )


def _line(
    job: _Job, judgement: Judgement, *, own_seconds: float, part_seconds: float, judge_seconds: float, notes: dict[str, Any]
) -> Line:
    told = judgement.line()
    first = ("reward", "true_reward", "hr@10", "ndcg@10", "legal")
    values: dict[str, Any] = {"method": job.method, "seed": job.seed, **{name: told.pop(name) for name in first}}
    values["seconds"] = round(own_seconds + part_seconds, 3)
    values["own_seconds"], values["judge_seconds"] = round(own_seconds, 3), round(judge_seconds, 3)
    return Line(job.method, job.seed, {**values, **told, "notes": notes})


def _prepare(place: Path, comparison: Comparison, seed: int, say: Callable[[str], None]) -> Data:
    catalogue = msgspec.structs.replace(comparison.config.catalogue, seed=seed)
    config = msgspec.structs.replace(comparison.config, catalogue=catalogue)
    if comparison.world is not None:
        return prepare_world(place, msgspec.structs.replace(comparison.world, seed=seed), config, say=say)
    assert comparison.kuairand is not None
    return prepare_kuairand(place, Path(comparison.kuairand), config, say=say)


def _task(place: Path, comparison: Comparison, seed: int, say: Callable[[str], None]) -> Task:
    catalogue, m = open_catalogue(place), comparison.config.session.target_items
    with Reader(train_state(place)) as reader:
        examples = list(training_examples(reader, catalogue, m=m))
        features = _features(reader, catalogue)
    if not examples:
        raise UserError(f"{train_state(place)} has no high-quality session to learn; give more users or days")
    return Task(
        folder=place, state=train_state(place), seed=seed, settings=comparison.settings, config=comparison.config,
        catalogue=catalogue, examples=examples, features=features, m=m, say=say,
    )


def _features(reader: Reader, catalogue: Catalogue) -> np.ndarray:
    """Categories of the items for FDSA, int [N, 3]: first tag, author, code of level 1; -1 for none."""
    records = {record.item_id: record for _, record in reader.items()}
    known = [records.get(item_id) for item_id in catalogue.item_ids]
    columns: list[list[str | None]] = [
        [record.tags[0] if record and record.tags else None for record in known],
        [record.author_id if record else None for record in known],
        [str(code) for code in catalogue.item_codes[:, 0]],
    ]
    features = np.full((len(known), len(columns)), -1, np.int64)
    for place, column in enumerate(columns):
        numbers = {value: number for number, value in enumerate(sorted({value for value in column if value is not None}))}
        features[:, place] = [-1 if value is None else numbers[value] for value in column]
    return features


def _seed_folder(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}"


def _settle(folder: Path, comparison: Comparison) -> None:
    """Note what the comparison is made of; raises UserError where the folder was made with something else."""
    path, now = folder / SETTINGS_FILE, msgspec.json.format(msgspec.json.encode(comparison))
    if path.exists():
        if path.read_bytes() != now:
            raise UserError(f"{folder} was begun with other settings (see {path}); give another --out")
        return
    if (folder / LINES_FILE).exists():
        raise UserError(f"{folder} has lines but no {SETTINGS_FILE}; give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(now)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}; give another") from None


def read_lines(folder: Path) -> list[Line]:
    """The lines of a folder, in the order in which they ended; one that was being written is left out."""
    path = folder / LINES_FILE
    content = path.read_bytes() if path.exists() else b""
    found = [msgspec.json.decode(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    return [Line(values["method"], values["seed"], values) for values in found]


def _append(folder: Path, line: Line) -> None:
    """Add a line and force it to the disk; a torn line before it is cut off."""
    path = folder / LINES_FILE
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(msgspec.json.encode(line.values) + b"\n")
        file.flush()
        os.fsync(file.fileno())
