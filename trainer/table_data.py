"""The data of a comparison: what may be learnt lies before a cut, what is tested after it, in one folder a seed.

FOLDER/train is a state of everything before the cut, with the catalogue of the items that existed then: what every
method learns from and chooses among. FOLDER/test is a state of the whole log, from which the cases come.
"""

from __future__ import annotations

import csv
import gzip
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import orjson

from onerec.config import Config
from onerec.errors import UserError
from simulator.log import write_world
from simulator.world import DAY_MS, World, WorldConfig
from streaming.item_files import read_items
from streaming.replay import Replay
from streaming.store import Reader, Store
from streaming.windows import windows
from trainer.data import Example, known_rows, session_examples
from trainer.items import Catalogue, build_catalogue, load_catalogue
from trainer.judge import Case, ItemFacts

DONE = "data.json"
KUAIRAND_DAY_OFFSET_MS = 8 * 3_600_000
"""Days of the KuaiRand log begin at midnight in Beijing."""


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """Where the data of one seed lies, and what decides it; `cut_ms`: cases begin there."""

    cut_ms: int
    world: WorldConfig | None
    kuairand: str | None


def train_state(folder: Path) -> Path:
    """The state to learn from."""
    return folder / "train"


def test_state(folder: Path) -> Path:
    """The state to test on."""
    return folder / "test"


def prepare_world(
    folder: Path, world: WorldConfig, config: Config, *, say: Callable[[str], None] = lambda text: None
) -> Data:
    """A simulated world, its last day for testing; what is there already is kept. Raises UserError for a one-day world."""
    if world.days < 2:
        raise UserError(f"a world of {world.days} day has nothing to learn before its last day; give it 2 or more")
    data = Data(cut_ms=world.start_ms + (world.days - 1) * DAY_MS, world=world, kuairand=None)
    if _is_done(folder, data):
        return data
    say(f"simulating {world.users:,} users, {world.items:,} items, {world.days} days")
    events, items = folder / "events.jsonl", folder / "items.jsonl"
    write_world(World(world), events, items)
    early = folder / "early.jsonl"
    with open(events, "rb") as source, open(early, "wb") as target:
        target.writelines(line for line in source if orjson.loads(line)["ts"] < data.cut_ms)
    return _replay(folder, data, [early], [events], items, "jsonl", config, say)


def prepare_kuairand(
    folder: Path, log: Path, config: Config, *, say: Callable[[str], None] = lambda text: None
) -> Data:
    """The KuaiRand log of a folder, its last day (Beijing time) for testing; raises UserError where there is none."""
    histories, events, videos = kuairand_files(log)
    with gzip.open(events, "rt", encoding="utf-8", newline="") as source:
        newest = max(int(row["time_ms"]) for row in csv.DictReader(source))
    cut = (newest + KUAIRAND_DAY_OFFSET_MS) // DAY_MS * DAY_MS - KUAIRAND_DAY_OFFSET_MS
    data = Data(cut_ms=cut, world=None, kuairand=str(log.resolve()))
    if _is_done(folder, data):
        return data
    early = folder / "early.csv"
    with (
        gzip.open(events, "rt", encoding="utf-8", newline="") as source,
        open(early, "w", encoding="utf-8", newline="") as target,
    ):
        reader = csv.DictReader(source)
        writer = csv.DictWriter(target, reader.fieldnames or [])
        writer.writeheader()
        writer.writerows(row for row in reader if int(row["time_ms"]) < cut)
    return _replay(folder, data, [*histories, early], [*histories, events], videos, "kuairand", config, say)


def kuairand_files(log: Path) -> tuple[list[Path], Path, Path]:
    """Histories, events and videos of a KuaiRand log; raises UserError where the folder does not have them."""
    events, videos = sorted(log.glob("events_*.csv.gz")), log / "videos.csv.gz"
    if len(events) != 1 or not videos.exists():
        raise UserError(f"--data {log}: expected one events_*.csv.gz and videos.csv.gz of the KuaiRand log there")
    return sorted(log.glob("history_before_*.jsonl.gz")), events[0], videos


def _is_done(folder: Path, data: Data) -> bool:
    """Whether the folder holds this very data; a half-made one is removed, one of other settings is refused."""
    path = folder / DONE
    if path.exists():
        found = msgspec.json.decode(path.read_bytes(), type=Data)
        if found != data:
            raise UserError(f"{folder} was made with other data settings ({found}); give another --out")
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return False


def _replay(
    folder: Path, data: Data, early: list[Path], all_events: list[Path], items: Path, form: str, config: Config,
    say: Callable[[str], None],
) -> Data:
    for state, sources, before in (
        (train_state(folder), early, data.cut_ms),
        (test_state(folder), all_events, None),
    ):
        say(f"replaying into {state}")
        with Store(state, config.semantics) as store:
            for batch in read_items(str(items), [], None):
                store.put_items([item for item in batch if before is None or item.ts < before])
            Replay(store, [str(path) for path in sources], wanted=form).run()
    say("semantic IDs")
    with Reader(train_state(folder)) as reader:
        build_catalogue(train_state(folder), reader, config)
    (folder / DONE).write_bytes(msgspec.json.encode(data))
    return data


def test_cases(folder: Path, data: Data, catalogue: Catalogue, *, count: int, seed: int) -> list[Case]:
    """First windows of high-quality sessions that begin after the cut: of each user the first, `count` users at random.

    Items that are not in the catalogue (uploaded after the cut) are left out of history and targets; a case without a
    target is none. Raises UserError where no case is left.
    """
    first: dict[str, Case] = {}
    with Reader(test_state(folder)) as reader:
        semantics = reader.semantics()
        m, n = semantics.session.target_items, semantics.history.length
        for _, session in reader.sessions():
            if session.high_quality and session.start >= data.cut_ms and session.user_id not in first:
                window = windows(session, m, n)[0]
                history = known_rows(window.history, catalogue.index, len(catalogue.index))
                targets = known_rows(window.items, catalogue.index, len(catalogue.index))
                if len(targets):
                    first[session.user_id] = Case(session.user_id, window.ts, history, targets)
    if not first:
        raise UserError(f"{test_state(folder)} has no high-quality session after the cut to test with; give more users")
    cases = [first[user_id] for user_id in sorted(first)]
    chosen = np.random.default_rng([seed, 5]).permutation(len(cases))[:count]
    return [cases[place] for place in sorted(chosen.tolist())]


def training_examples(reader: Reader, catalogue: Catalogue, *, m: int) -> Iterator[Example]:
    """The windows that OneRec learns, in the order of the log: what every other method learns too."""
    length = reader.semantics().history.length
    for _, session in reader.sessions():
        if session.high_quality:
            yield from session_examples(
                session, catalogue.index, len(catalogue.index), m=m, n=length, fresh=True, counts=Counter()
            )


def item_facts(reader: Reader, catalogue: Catalogue) -> ItemFacts:
    """Upload times and labels of the catalogue's rows; labels are the finest tag, else the author, else the first code."""
    records = {record.item_id: record for _, record in reader.items()}
    known = [records.get(item_id) for item_id in catalogue.item_ids]
    upload = np.array([record.ts if record else 0 for record in known], np.int64)
    topics = [record.tags[-1] if record and record.tags else None for record in known]
    authors = [record.author_id if record else None for record in known]
    for label, values in (("topic", topics), ("author", authors)):
        named = [value for value in values if value is not None]
        if len(named) == len(values):
            numbers = {value: number for number, value in enumerate(sorted(set(named)))}
            return ItemFacts(upload, np.array([numbers[value] for value in named], np.int64), label)
    return ItemFacts(upload, catalogue.item_codes[:, 0].astype(np.int64), "level-1 code")


def open_catalogue(folder: Path) -> Catalogue:
    """The catalogue of the training state: what there is to choose among."""
    return load_catalogue(train_state(folder))
