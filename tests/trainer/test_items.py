"""The catalogue over a real store: building, what decides an item's codes, new items, loading and damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from onerec.config import load_config
from onerec.errors import Failure, UserError
from streaming.items import ItemRecord
from streaming.replay import Replay
from streaming.semantics import Semantics
from streaming.store import Reader, Store
from trainer import catalogue_files
from trainer.items import build_catalogue, load_catalogue, refresh_catalogue

DAY = 1_700_000_000_000
CONFIG = load_config(None, ["catalogue.codes=8", "catalogue.iterations=5", "catalogue.dimension=8"])


def record(item_id, **keys):
    return ItemRecord(item_id=item_id, ts=DAY, **keys)


def described(count, start=0):
    """Items with tags and author but nobody who watched them."""
    return [record(f"i{n}", tags=[f"t{n % 5}"], author_id=f"a{n % 11}", duration_ms=1000 * (n + 1))
            for n in range(start, start + count)]


def watches(user, items, at=DAY):
    """A session of effective watches."""
    return [{"type": "watch", "user_id": user, "item_id": item, "ts": at + 20_000 * n, "watch_ms": 15_000,
             "duration_ms": 15_000} for n, item in enumerate(items)]


class World:
    """A state folder with its writer and a reader beside it."""

    def __init__(self, folder):
        self.folder, self.state, self.logs = folder, folder / "state", 0
        self.store = Store(self.state, Semantics())
        self.store.sync()
        self.reader = Reader(self.state)

    def put(self, *records):
        self.store.put_items(list(records))
        self.reader.refresh()

    def replay(self, events):
        self.logs += 1
        path = self.folder / f"log{self.logs}.jsonl"
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
        Replay(self.store, [str(path)]).run()
        self.reader.refresh()

    def build(self, config=CONFIG, **keys):
        return build_catalogue(self.state, self.reader, config, **keys)

    def refresh(self, base=None):
        return refresh_catalogue(self.state, self.reader, base)

    def files(self):
        """Every file below the catalogue with its bytes."""
        root = catalogue_files.folder_of(self.state)
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.reader.close()
    made.store.close()


def two_tastes(users=30, start=0):
    """Users who watch only even or only odd items, five each."""
    rng = np.random.default_rng(7)
    return [event for user in range(start, start + users)
            for event in watches(f"u{user}", [f"i{2 * n + user % 2}" for n in rng.permutation(20)[:8]])]


def test_codes_are_balanced_over_the_items_of_a_state(world):
    world.put(*described(100))
    catalogue = world.build()
    assert catalogue.levels == 3 and catalogue.codes == 8
    assert sorted(catalogue.item_ids) == sorted(f"i{n}" for n in range(100))
    for level in catalogue.item_codes.T:
        assert set(np.bincount(level, minlength=8)) == {12, 13}
    assert catalogue.fitted.all() and catalogue.item_codes.dtype == np.int32
    assert all(catalogue.index[item] == row for row, item in enumerate(catalogue.item_ids))
    assert catalogue.tags[catalogue.index["i7"]] == ["t2"]


def test_items_that_the_same_people_watch_lie_closer_than_others(world):
    world.replay(two_tastes())
    catalogue = world.build()
    vectors = catalogue.vectors()
    even = np.array([int(item[1:]) % 2 == 0 for item in catalogue.item_ids])
    cosine = vectors @ vectors.T
    assert cosine[even][:, even].mean() > 0.3 + cosine[even][:, ~even].mean()
    assert catalogue.origins == {"behaviour": 40}


def test_items_known_only_from_behaviour_and_only_from_records_are_both_there_the_watched_first(world):
    world.put(*described(10, start=100))
    world.replay(two_tastes())
    catalogue = world.build()
    assert set(catalogue.item_ids) == {f"i{n}" for n in (*range(40), *range(100, 110))}
    assert catalogue.origins == {"behaviour": 40, "side": 10}
    assert all(int(item[1:]) < 40 for item in catalogue.item_ids[:40])


def test_a_described_item_nobody_watched_lies_near_the_watched_ones_with_its_tags(world):
    world.put(*[record(f"i{n}", tags=["even" if n % 2 == 0 else "odd"]) for n in range(40)], record("x", tags=["odd"]))
    world.replay(two_tastes())
    catalogue = world.build()
    vectors = catalogue.vectors()
    near = vectors @ vectors[catalogue.index["x"]]
    odd = np.array([item.startswith("i") and int(item[1:]) % 2 == 1 for item in catalogue.item_ids])
    even = np.array([item.startswith("i") and int(item[1:]) % 2 == 0 for item in catalogue.item_ids])
    assert near[odd].mean() > 0.3 + near[even].mean()


def test_the_same_state_and_seed_give_the_same_bytes_whatever_was_built_before(world, tmp_path):
    world.put(*described(60))
    world.replay(two_tastes())
    first = world.build()
    files = world.files()
    world.build(load_config(None, ["catalogue.codes=4"]))
    again = world.build()
    assert (again.version, again.revision) == (first.version, first.revision)
    assert {name: data for name, data in world.files().items() if name in files} == files
    other = world.build(load_config(None, ["catalogue.codes=8", "catalogue.dimension=8", "catalogue.seed=1"]))
    assert other.version != first.version


def test_nothing_after_until_is_looked_at(world, tmp_path):
    world.put(*described(20))
    world.replay(two_tastes())
    before = world.build(until=DAY + 3_600_000)
    later = DAY + 86_400_000
    world.replay([event for user in range(30) for event in watches(f"u{user}", ["i0", "i1", "i2", "late"], later)])
    world.put(ItemRecord(item_id="fresh", ts=later, tags=["t1"]))
    after = world.build(until=DAY + 3_600_000)
    assert after.version == before.version
    assert {item for item in after.item_ids if not after.fitted[after.index[item]]} == {"late", "fresh"}
    assert world.build().version != before.version


def test_a_new_item_gets_codes_at_once_and_the_version_stays(world):
    world.put(*described(50))
    built = world.build()
    world.put(record("new", tags=["t3"], author_id="a4"))
    catalogue = world.refresh()
    assert catalogue.version == built.version and catalogue.revision != built.revision
    assert catalogue.item_ids == [*built.item_ids, "new"]
    assert np.array_equal(catalogue.item_codes[:-1], built.item_codes)
    assert catalogue.fitted.sum() == 50 and not catalogue.fitted[-1]
    assert catalogue.tags[-1] == ["t3"]
    assert np.array_equal(catalogue.codes_of(["new", "unknown", "i0"]),
                          catalogue.item_codes[[50, catalogue.index["i0"]]])
    assert "new" not in built.index


def test_new_items_get_the_same_codes_one_by_one_together_or_by_another_process(tmp_path):
    found = []
    for name, steps in (("single", 5), ("together", 1)):
        (tmp_path / name).mkdir()
        world = World(tmp_path / name)
        world.put(*described(50))
        base = world.build()
        newcomers = described(20, start=50)
        for step in range(steps):
            world.put(*newcomers[step * 20 // steps: (step + 1) * 20 // steps])
            base = world.refresh(base)
        loaded = load_catalogue(world.state)
        assert (loaded.revision, loaded.item_ids) == (base.revision, base.item_ids)
        assert np.array_equal(loaded.item_codes, base.item_codes)
        found.append((base.version, base.revision, base.item_ids, base.item_codes.tolist()))
        world.reader.close()
        world.store.close()
    assert found[0] == found[1]


def test_a_refresh_with_nothing_new_gives_back_what_it_was_given(world):
    world.put(*described(20))
    catalogue = world.build()
    assert world.refresh(catalogue) is catalogue


def test_a_refresh_of_a_held_catalogue_reads_nothing_but_what_is_new(world, monkeypatch):
    world.put(*described(20))
    held = world.build()
    world.put(record("new", tags=["t1"]))
    monkeypatch.setattr(catalogue_files, "read_version", None)
    seen = []
    real = world.reader.items
    monkeypatch.setattr(world.reader, "items", lambda after=0: (seen.append(item) or item for item in real(after)))
    assert world.refresh(held).item_ids[-1] == "new"
    assert {item.item_id for _, item in seen} == {"new"}


def test_an_item_only_sessions_know_gets_the_codes_of_its_company(world):
    world.replay(two_tastes())
    built = world.build()
    company = [f"i{2 * n}" for n in range(6)]
    world.replay(watches("newcomer", [*company[:3], "stranger", *company[3:]], DAY + 86_400_000))
    catalogue = world.refresh()
    assert catalogue.version == built.version
    mean = built.vectors()[[built.index[item] for item in company]].mean(axis=0)
    distance = ((catalogue.centroids[0] - mean / np.linalg.norm(mean)) ** 2).sum(axis=1)
    assert catalogue.codes_of(["stranger"])[0, 0] == distance.argmin()


def test_a_re_sent_item_keeps_its_codes_and_gets_its_new_tags(world):
    world.put(*described(20))
    built = world.build()
    world.put(record("i3", tags=["other"], author_id="zz"))
    catalogue = world.refresh(built)
    assert np.array_equal(catalogue.item_codes, built.item_codes)
    assert catalogue.tags[catalogue.index["i3"]] == ["other"]
    assert load_catalogue(world.state).tags == catalogue.tags


def test_an_item_with_nothing_to_go_by_is_named_and_left_out_until_something_is_known(world, caplog):
    world.put(*described(20), record("bare"))
    catalogue = world.build()
    assert catalogue.left_out == ["bare"] and "bare" not in catalogue.index
    assert "bare" in caplog.text and "--vectors" in caplog.text
    world.put(record("bare", tags=["t1"]))
    catalogue = world.refresh()
    assert catalogue.left_out == [] and "bare" in catalogue.index


def test_a_state_of_bare_items_and_an_empty_state_are_refused_with_the_remedy(world):
    with pytest.raises(UserError, match="onerec replay"):
        world.build()
    world.put(record("bare"))
    with pytest.raises(UserError, match="--vectors"):
        world.build()
    assert catalogue_files.current_version(world.state) is None


def test_embeddings_of_item_events_are_the_vectors_and_place_new_items(world):
    rng = np.random.default_rng(0)
    centres = np.eye(4, 6) * 5

    def near(n):
        return record(f"i{n}", tags=[f"c{n % 4}"], embedding=(centres[n % 4] + 0.1 * rng.normal(size=6)).tolist())

    world.put(*[near(n) for n in range(40)], record("tagged", tags=["c2"]))
    catalogue = world.build(load_config(None, ["catalogue.codes=4"]))
    assert catalogue.space == "embedding" and catalogue.centroids.shape == (3, 4, 6)
    assert catalogue.origins == {"own": 40, "side": 1}
    vectors = catalogue.vectors()
    assert np.linalg.norm(vectors[catalogue.index["tagged"]] - centres[2]) < 1.0
    world.put(near(41))
    fresh = world.refresh()
    distance = ((fresh.centroids[0] - centres[1]) ** 2).sum(axis=1)
    assert fresh.codes_of(["i41"])[0, 0] == distance.argmin()


def test_given_vectors_win_and_items_without_one_take_the_mean_of_their_company(world, tmp_path):
    world.replay(two_tastes())
    path = tmp_path / "vectors.jsonl"
    path.write_text("".join(json.dumps({"item_id": f"i{n}", "embedding": [float(n % 2), 1.0]}) + "\n"
                            for n in range(36)))
    catalogue = world.build(vectors=path)
    assert catalogue.space == "given" and catalogue.origins == {"own": 36, "behaviour": 4}
    vectors = catalogue.vectors()
    for n in range(36, 40):
        assert np.allclose(vectors[catalogue.index[f"i{n}"]], [n % 2, 1.0])


@pytest.mark.parametrize("fault", ["nan", "dimension"])
def test_bad_vectors_change_nothing(world, tmp_path, fault):
    world.put(*described(20))
    world.build()
    before = world.files()
    path = tmp_path / "vectors.jsonl"
    bad = [None, 1.0] if fault == "nan" else [1.0]
    path.write_text(json.dumps({"item_id": "i0", "embedding": [0.0, 1.0]}) + "\n"
                    + json.dumps({"item_id": "i1", "embedding": bad}) + "\n")
    with pytest.raises(UserError, match="line 2, item 'i1'"):
        world.build(vectors=path)
    assert world.files() == before


def test_codes_made_elsewhere_are_kept_and_other_items_get_the_nearest(world, tmp_path):
    world.put(*described(30))
    path = tmp_path / "codes.json"
    codes = {f"i{n}": [n % 5, n % 3, n % 2, 1] for n in range(25)}
    path.write_text(json.dumps(codes))
    catalogue = world.build(load_config(), codes_file=path)
    assert (catalogue.levels, catalogue.codes, catalogue.method) == (4, 5, "loaded")
    assert {item: catalogue.codes_of([item])[0].tolist() for item in codes} == codes
    assert catalogue.fitted.sum() == 25 and len(catalogue.item_ids) == 30
    assert catalogue.item_ids[:25] == list(codes)
    world.put(record("new", tags=["t1"]))
    assert "new" in world.refresh().index


def test_codes_made_elsewhere_work_without_any_vector(world, tmp_path, caplog):
    path = tmp_path / "codes.json"
    path.write_text(json.dumps({"a": [0, 1], "b": [1, 1]}))
    catalogue = world.build(load_config(), codes_file=path)
    assert catalogue.centroids is None and catalogue.vectors() is None
    assert load_catalogue(world.state).version == catalogue.version
    world.put(record("new", tags=["t1"]))
    assert "new" not in world.refresh().index
    assert "new" in caplog.text


def test_no_catalogue_is_said_with_the_remedy(world):
    with pytest.raises(UserError, match="onerec items"):
        load_catalogue(world.state)


@pytest.mark.parametrize("name", ["codes.npy", "centroids.npy", "items.json", "vectors.npy", "manifest.json"])
def test_damage_to_any_file_is_found_and_a_build_mends_it(world, name):
    world.put(*described(20))
    built = world.build()
    path = catalogue_files.folder_of(world.state) / built.version / name
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(UserError, match="--build"):
        load_catalogue(world.state)
    assert world.build().version == built.version
    assert path.read_bytes() == data


def test_a_foreign_folder_and_another_format_are_refused(world):
    world.put(*described(20))
    path = catalogue_files.folder_of(world.state) / world.build().version / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_catalogue(world.state)
    path.write_text("{}")
    with pytest.raises(UserError, match="not written by onerec"):
        load_catalogue(world.state)


def test_a_torn_journal_line_is_as_if_never_written(world):
    world.put(*described(20))
    built = world.build()
    world.put(record("one", tags=["t1"]))
    whole = world.refresh()
    path = catalogue_files.folder_of(world.state) / built.version / catalogue_files.JOURNAL
    data = path.read_bytes()
    for cut in range(len(data) - 1, 0, -7):
        path.write_bytes(data[:cut])
        assert load_catalogue(world.state).revision == built.revision
        assert world.refresh().revision == whole.revision
        assert path.read_bytes() == data


def test_a_changed_journal_is_found(world):
    world.put(*described(20))
    built = world.build()
    world.put(record("one", tags=["t1"]))
    world.refresh()
    path = catalogue_files.folder_of(world.state) / built.version / catalogue_files.JOURNAL
    path.write_bytes(path.read_bytes().replace(b'"one"', b'"two"'))
    with pytest.raises(UserError, match="corrupt"):
        load_catalogue(world.state)


def test_a_disk_that_refuses_leaves_the_catalogue_as_it_was(world, monkeypatch):
    world.put(*described(20))
    built = world.build()
    before = world.files()
    written = []

    def full(path, data):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(catalogue_files, "_write_synced", full)
    with pytest.raises(Failure, match="No space left"):
        world.build(load_config(None, ["catalogue.codes=4"]))
    assert world.files() == before
    assert load_catalogue(world.state).version == built.version


def test_two_processes_that_refresh_at_once_agree(world):
    world.put(*described(40))
    built = world.build()
    world.put(*described(40, start=40))
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        revisions = pool.map(_refresh_elsewhere, [world.state] * 4)
    assert len(set(revisions)) == 1
    assert revisions[0] == load_catalogue(world.state).revision != built.revision


def _refresh_elsewhere(state):
    with Reader(state) as reader:
        return refresh_catalogue(state, reader).revision


def _build_for_ever(state, seed, ready):
    """Builds one version after another until killed."""
    with Reader(state) as reader:
        while True:
            seed += 1
            build_catalogue(state, reader, load_config(None, ["catalogue.codes=8", f"catalogue.seed={seed}",
                                                              "catalogue.iterations=1"]))
            ready.set()


@pytest.mark.slow
def test_killed_at_any_moment_a_build_leaves_a_whole_catalogue(world):
    world.put(*described(30))
    world.build()
    context = multiprocessing.get_context("spawn")
    seen = set()
    for attempt in range(4):
        ready = context.Event()
        process = context.Process(target=_build_for_ever, args=(world.state, 1000 * attempt, ready))
        process.start()
        ready.wait(60)
        time.sleep(0.013 + 0.017 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        seen.add(load_catalogue(world.state).version)
    assert len(seen) > 1


