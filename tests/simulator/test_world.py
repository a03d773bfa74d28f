"""The simulated world: reproducible, drifting, growing, and honest about its own truth."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import orjson
import pytest
import zstandard

from onerec.errors import Failure, UserError
from simulator.behaviour import Behaviour
from simulator.log import items_path, open_output, write_world
from simulator.world import DAY_MS, LONGEST_RATIO, SWT_CAP_MS, WATCH_SIGMA, World, WorldConfig
from streaming.events import Rejected, decode

SMALL = WorldConfig(users=80, items=150, days=4, seed=5, progress_share=0.1, late_share=0.02, duplicate_share=0.02)


def written(folder: Path, config: WorldConfig, suffix: str = ".jsonl") -> tuple[bytes, bytes]:
    """Bytes of the events and items files of a world."""
    events = folder / f"w{suffix}"
    write_world(World(config), events, items_path(events))
    return events.read_bytes(), items_path(events).read_bytes()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[dict]]:
    """Events and items of the small world."""
    events, items = written(tmp_path_factory.mktemp("world"), SMALL)
    return [orjson.loads(line) for line in events.splitlines()], [orjson.loads(line) for line in items.splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path, suffix: str) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first = written(folders[0], SMALL, suffix)
    assert first == written(folders[1], SMALL, suffix)
    other = WorldConfig(users=80, items=150, days=4, seed=6)
    assert all(a != b for a, b in zip(first, written(folders[2], other, suffix), strict=True))


def test_compressed_files_hold_the_plain_bytes(tmp_path: Path) -> None:
    plain, _ = written(tmp_path, SMALL)
    assert gzip.decompress(written(tmp_path, SMALL, ".jsonl.gz")[0]) == plain
    assert zstandard.ZstdDecompressor().decompressobj().decompress(written(tmp_path, SMALL, ".jsonl.zst")[0]) == plain


def test_every_event_is_valid_by_the_rules_of_the_stream(tmp_path: Path) -> None:
    max_ts = SMALL.start_ms + (SMALL.days + 1) * DAY_MS
    for lines in written(tmp_path, SMALL):
        for line in lines.splitlines():
            assert not isinstance(decode(line, max_ts), Rejected)


def test_no_item_is_shown_before_its_upload(log: tuple[list[dict], list[dict]]) -> None:
    events, items = log
    uploaded = {item["item_id"]: item["ts"] for item in items}
    assert all(event["ts"] >= uploaded[event["item_id"]] for event in events)


def test_inline_uploads_stand_in_the_log_before_their_first_event(tmp_path: Path) -> None:
    plain, catalogue = written(tmp_path, SMALL)
    events = tmp_path / "inline.jsonl"
    write_world(World(SMALL), events, items_path(events), inline=True)
    lines = events.read_bytes().splitlines(keepends=True)
    inline = [line for line in lines if line.startswith(b'{"type":"item"')]
    assert len(inline) == SMALL.items // 2
    assert b"".join(line for line in lines if line not in set(inline)) == plain
    assert items_path(events).read_bytes() + b"".join(inline) == catalogue
    known = {orjson.loads(line)["item_id"] for line in items_path(events).read_bytes().splitlines()}
    for line in lines:
        event = orjson.loads(line)
        if event["type"] == "item":
            known.add(event["item_id"])
        else:
            assert event["item_id"] in known


def test_new_items_appear_and_are_watched_every_day(log: tuple[list[dict], list[dict]]) -> None:
    events, items = log
    watched = {event["item_id"] for event in events if event["type"] == "watch"}
    for day in range(SMALL.days):
        start = SMALL.start_ms + day * DAY_MS
        today = {item["item_id"] for item in items if start <= item["ts"] < start + DAY_MS}
        assert len(today) >= SMALL.items // 2 // SMALL.days
        assert today & watched


def test_arrival_is_nearly_by_event_time_with_a_few_late_ones(log: tuple[list[dict], list[dict]]) -> None:
    newest, late = 0, 0
    for event in log[0]:
        late += event["ts"] < newest - 300_000
        newest = max(newest, event["ts"])
    assert 0 < late < 0.05 * len(log[0])


def test_progress_reports_share_an_event_id_and_end_with_the_longest(log: tuple[list[dict], list[dict]]) -> None:
    reports: dict[str, list[dict]] = {}
    for event in log[0]:
        if event["type"] == "watch" and event["event_id"]:
            reports.setdefault(event["event_id"], []).append(event)
    assert reports
    for same in reports.values():
        assert len({(event["user_id"], event["item_id"], event["ts"]) for event in same}) == 1
        assert len(same) >= 2


def test_without_faults_nothing_is_late_or_twice(tmp_path: Path) -> None:
    quiet = WorldConfig(users=50, items=100, days=2, seed=1, late_share=0, duplicate_share=0, progress_share=0)
    lines = written(tmp_path, quiet)[0].splitlines()
    assert len(set(lines)) == len(lines)


def test_nobody_is_in_two_sessions_at_once(log: tuple[list[dict], list[dict]]) -> None:
    spans: dict[str, dict[str, list[int]]] = {}
    for event in log[0]:
        if event["type"] == "watch":
            sessions = spans.setdefault(event["user_id"], {})
            sessions.setdefault(event["request_id"].split("-")[0], []).append(event["ts"])
    for sessions in spans.values():
        ordered = sorted((min(times), max(times)) for times in sessions.values())
        assert all(later[0] - earlier[1] > 1_800_000 for earlier, later in itertools.pairwise(ordered))


def test_events_come_at_every_hour(log: tuple[list[dict], list[dict]]) -> None:
    assert {event["ts"] // 3_600_000 % 24 for event in log[0]} == set(range(24))


def test_default_thresholds_are_often_met(log: tuple[list[dict], list[dict]]) -> None:
    sessions: dict[str, list[int]] = {}
    for event in log[0]:
        session = sessions.setdefault(event["request_id"].split("-")[0], [0, 0, 0])
        if event["type"] == "watch":
            session[0] += event["watch_ms"] >= min(7_000, event["duration_ms"])
            session[1] += event["watch_ms"]
        elif event["type"] != "dislike":
            session[2] += 1
    good = [watched >= 5 and total >= 60_000 and interactions for watched, total, interactions in sessions.values()]
    assert 0.25 < np.mean(good) < 0.75


def test_tastes_drift_and_stand_still_without_drift() -> None:
    world = World(SMALL)
    likeness = np.einsum("ud,ud->u", world.tastes(0), world.tastes(20))
    assert likeness.mean() < 0.9
    still = World(WorldConfig(users=80, items=150, days=4, seed=5, drift=0.0))
    np.testing.assert_allclose(still.tastes(0), still.tastes(20), atol=1e-12)


def test_a_world_does_not_depend_on_the_order_of_questions() -> None:
    one, other = World(SMALL), World(SMALL)
    late_first = one.tastes(3)
    for day in range(4):
        other.tastes(day)
    np.testing.assert_array_equal(late_first, other.tastes(3))


def test_true_reward_is_the_mean_of_simulated_sessions() -> None:
    world = World(SMALL)
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, SMALL.users, 6), rng.integers(0, SMALL.items, (6, 5))
    told = world.true_rewards(users, items, day=2)
    said = world.responses(world.tastes(2)[users][:, None], items, world.fatigue(world.topic[items]), np.arange(5.0))
    draws = 40_000
    duration = world.duration_ms[items]
    watch = np.exp(said.log_watch + WATCH_SIGMA * rng.standard_normal((draws, 6, 5)))
    watch = np.minimum(watch, LONGEST_RATIO * duration)
    effective = watch >= np.minimum(duration, 7_000)
    follows = effective & (rng.random(watch.shape) < said.follow)
    likes = effective & (rng.random(watch.shape) < said.like)
    np.testing.assert_allclose(told.swt, np.minimum(1, watch.sum(2) / SWT_CAP_MS).mean(0), atol=0.005)
    np.testing.assert_allclose(told.vtr, effective.mean(2).mean(0), atol=0.01)
    np.testing.assert_allclose(told.wtr, follows.any(2).mean(0), atol=0.01)
    np.testing.assert_allclose(told.ltr, likes.any(2).mean(0), atol=0.01)


def test_true_reward_prefers_what_the_user_likes_and_variety() -> None:
    world = World(WorldConfig(users=20, items=2_000, days=1, seed=3))
    affinity = np.einsum("d,nd->n", world.tastes(0)[7], world.item_vectors)
    order = np.argsort(-affinity)
    best = [f"v{item}" for item in order[:5]]
    worst = [f"v{item}" for item in order[-5:]]
    assert world.true_reward("u7", best).vtr > world.true_reward("u7", worst).vtr + 0.2
    topics = np.array([[3, 3, 3], [3, 4, 3], [3, 4, 5]])
    assert (np.diff(world.fatigue(topics).sum(axis=1)) < 0).all()


def test_unknown_ids_are_refused() -> None:
    world = World(SMALL)
    for user, item in (("u80", "v1"), ("x1", "v1"), ("u1", "v150"), ("u1", "v-1")):
        with pytest.raises(KeyError, match="not in this world"):
            world.true_reward(user, [item])


def test_the_smallest_world_has_a_log(tmp_path: Path) -> None:
    for seed in range(3):
        written(tmp_path, WorldConfig(users=1, items=1, days=1, seed=seed))


def test_blocks_come_in_order_of_arrival() -> None:
    newest = 0
    for end, columns in Behaviour(World(SMALL)).blocks():
        arrivals = columns["arrival"]
        if len(arrivals):
            assert arrivals[0] >= newest
            assert (np.diff(arrivals) >= 0).all()
            newest = int(arrivals[-1])
            assert newest < end or end == SMALL.start_ms + SMALL.days * DAY_MS


@pytest.mark.parametrize("wrong", [{"users": 0}, {"days": -1}, {"seed": -1}, {"late_share": 1.5}, {"start_ms": 12}])
def test_impossible_worlds_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        WorldConfig(**wrong)


def test_a_folder_that_is_missing_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"), open_output(tmp_path / "no" / "w.jsonl"):
        pass


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    target = tmp_path / "w.jsonl"
    target.write_bytes(b"old")
    with pytest.raises(Failure, match="No space left"), open_output(target), open("/dev/full", "wb", 0) as full:
        full.write(b"x" * 10)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_one_file_for_both_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="items-out"):
        write_world(World(SMALL), tmp_path / "w", tmp_path / "w")
