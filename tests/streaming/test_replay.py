"""Files into RocksDB: formats, merging, resuming after kill -9, bad input; every run in a process or store of its own."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import polars
import pytest
import zstandard

from onerec.errors import UserError
from streaming.dead_letters import letters, redriven
from streaming.replay import Clock, Replay
from streaming.semantics import Semantics, SessionConfig, StreamConfig
from streaming.sessions import session_json
from streaming.store import Reader, Store

T0 = 1_700_000_000_000
MINUTE = 60_000


def watch(user: str, item: str, ts: int, watch_ms: int = 9_000, duration_ms: int = 10_000, **more: object) -> dict:
    durations = {"watch_ms": watch_ms, "duration_ms": duration_ms}
    return {"type": "watch", "user_id": user, "item_id": item, "ts": ts, **durations, **more}


def world(events: int = 3_000, seed: int = 1, users: int = 40) -> list[dict]:
    """Events in order of time: sessions of a few watches, interactions, some repeats."""
    rng = random.Random(seed)
    ts, found = T0, []
    for _ in range(events):
        ts += rng.randrange(0, 4_000)
        user, item = f"u{rng.randrange(users)}", f"i{rng.randrange(200)}"
        found.append(watch(user, item, ts, rng.randrange(0, 40_000), 30_000))
        if rng.random() < 0.2:
            found.append({"type": rng.choice(["like", "share", "follow"]), "user_id": user, "item_id": item, "ts": ts})
        if rng.random() < 0.05:
            found.append({**found[-1]})
    return found


def lines(events: list[dict]) -> bytes:
    return b"".join(orjson.dumps(event) + b"\n" for event in events)


def replay(state: Path, *paths: Path | str, semantics: Semantics | None = None, **options: object) -> dict:
    with Store(state, semantics or Semantics()) as store:
        return Replay(store, [str(path) for path in paths], **options).run()  # type: ignore[arg-type]


def answers(state: Path) -> tuple[bytes, bytes, str, int | None]:
    with Reader(state) as reader:
        sessions = b"\n".join(session_json(session) for _, session in reader.sessions())
        histories = b"\n".join(orjson.dumps([user, items]) for user, items in reader.users())
        return sessions, histories, str(reader.counters()), reader.watermark()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(world()))
    return path


def test_the_final_line_has_the_keys_of_the_specification_in_order(log: Path, tmp_path: Path) -> None:
    summary = replay(tmp_path / "s", log)
    assert list(summary) == [
        "events", "duplicates", "late", "dead_letters", "users", "sessions", "high_quality", "watermark", "seconds",
        "events_per_second",
    ]
    assert summary["events"] == len(world()) and summary["dead_letters"] == 0 and summary["duplicates"] > 0


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", lambda b: zstandard.ZstdCompressor().compress(b))])
def test_compressed_files_give_the_same_state(log: Path, tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    replay(tmp_path / "plain", log)
    packed = tmp_path / f"events.jsonl{suffix}"
    packed.write_bytes(pack(log.read_bytes()))
    replay(tmp_path / "packed", packed)
    assert answers(tmp_path / "packed") == answers(tmp_path / "plain")


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batch_size_changes_nothing(log: Path, tmp_path: Path, batch: int) -> None:
    replay(tmp_path / "whole", log)
    replay(tmp_path / "cut", log, max_batch=batch)
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")


def test_csv_and_parquet_by_map_give_the_same_sessions(tmp_path: Path) -> None:
    events = [event for event in world() if event["type"] == "watch"]
    (tmp_path / "a.jsonl").write_bytes(lines(events))
    rows = [{"uid": e["user_id"], "vid": e["item_id"], "at": e["ts"], "played": e["watch_ms"], "len": e["duration_ms"]}
            for e in events]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    polars.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    mapping = {"uid": "user_id", "vid": "item_id", "at": "ts", "played": "watch_ms", "len": "duration_ms"}
    replay(tmp_path / "s1", tmp_path / "a.jsonl")
    replay(tmp_path / "s2", tmp_path / "a.csv", mapping=mapping)
    replay(tmp_path / "s3", tmp_path / "a.parquet", mapping=mapping)
    assert answers(tmp_path / "s1") == answers(tmp_path / "s2") == answers(tmp_path / "s3")


def test_map_renames_the_keys_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"uid":7,"vid":"x","at":%d,"played":9000,"user_id":null}\n' % T0)
    mapping = {"uid": "user_id", "vid": "item_id", "at": "ts", "played": "watch_ms"}
    assert replay(tmp_path / "s", tmp_path / "a.jsonl", mapping=mapping)["events"] == 1
    with Reader(tmp_path / "s") as reader:
        assert list(reader.users()) == [("7", ["x"])]


def test_several_files_are_merged_by_event_time(tmp_path: Path) -> None:
    events = world()
    (tmp_path / "one.jsonl").write_bytes(lines(events))
    parts: list[list[dict]] = [[], [], []]
    for event in events:
        parts[{"watch": 0, "like": 1}.get(event["type"], 2)].append(event)
    names = []
    for number, part in enumerate(parts):
        names.append(tmp_path / f"part{number}.jsonl")
        names[-1].write_bytes(lines(part))
    one = replay(tmp_path / "one", tmp_path / "one.jsonl")
    merged = replay(tmp_path / "merged", *names)
    assert merged["late"] == 0
    assert answers(tmp_path / "one") == answers(tmp_path / "merged")
    assert one["events"] == merged["events"]


def test_a_line_that_is_no_event_waits_for_nobody_in_a_merge(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([watch("u", "a", T0), watch("u", "b", T0 + 10)]))
    (tmp_path / "b.jsonl").write_bytes(b"broken\n" + lines([watch("u", "c", T0 + 5)]))
    assert replay(tmp_path / "s", tmp_path / "a.jsonl", tmp_path / "b.jsonl")["dead_letters"] == 1
    with Reader(tmp_path / "s") as reader:
        assert [item.item_id for _, session in reader.sessions() for item in session.items] == ["a", "c", "b"]


def test_the_same_command_again_adds_nothing(log: Path, tmp_path: Path) -> None:
    first = replay(tmp_path / "s", log)
    before = answers(tmp_path / "s")
    again = replay(tmp_path / "s", log)
    assert answers(tmp_path / "s") == before
    assert {k: again[k] for k in list(first)[:8]} == {k: first[k] for k in list(first)[:8]}


def test_a_file_that_has_grown_goes_on_where_it_was(tmp_path: Path) -> None:
    events = world()
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(events[:1_000]))
    replay(tmp_path / "s", path, flush=False)
    path.write_bytes(lines(events))
    replay(tmp_path / "s", path)
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes(lines(events))
    replay(tmp_path / "w", whole)
    assert answers(tmp_path / "s") == answers(tmp_path / "w")


def test_another_file_under_the_same_name_is_refused(log: Path, tmp_path: Path) -> None:
    replay(tmp_path / "s", log)
    before = answers(tmp_path / "s")
    log.write_bytes(lines(world(seed=2)))
    with pytest.raises(UserError, match="not the file that was replayed"):
        replay(tmp_path / "s", log)
    assert answers(tmp_path / "s") == before


def command(state: Path, *paths: Path | str, extra: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", "onerec.cli", "replay", *map(str, paths), "--state", str(state), *extra]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "merged", "csv.gz"])
def test_kill_9_at_random_moments_then_the_same_command_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    events = world(40_000, users=300)
    paths = [tmp_path / "a.jsonl"]
    if kind == "one":
        paths[0].write_bytes(lines(events))
    elif kind == "merged":
        paths.append(tmp_path / "b.jsonl")
        paths[0].write_bytes(lines([e for e in events if e["type"] == "watch"]))
        paths[1].write_bytes(lines([e for e in events if e["type"] != "watch"]) + b"broken\n")
    else:
        paths[0] = tmp_path / "a.csv.gz"
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["type", "user_id", "item_id", "ts", "watch_ms", "duration_ms"])
        writer.writeheader()
        writer.writerows(events)
        paths[0].write_bytes(gzip.compress(text.getvalue().encode()))
    extra = ("--batch", "500")
    subprocess.run(command(tmp_path / "whole", *paths, extra=extra), check=True, capture_output=True)
    rng = random.Random(7)
    state, kills, reached = tmp_path / "killed", 0, []
    while kills < 6:
        process = subprocess.Popen(command(state, *paths, extra=extra), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        seen = counted(state)
        while process.poll() is None and counted(state) == seen and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.15)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        reached.append(counted(state))
    assert kills >= 2, "the replay was over before it could be killed"
    assert reached == sorted(reached)
    subprocess.run(command(state, *paths, extra=extra), check=True, capture_output=True)
    assert answers(state) == answers(tmp_path / "whole")


def counted(state: Path) -> int:
    """Events in the state as a reader beside the writer sees them; 0 while there is none."""
    try:
        with Reader(state) as reader:
            return reader.counters().events
    except Exception:
        return 0


def test_ctrl_c_stops_between_commits_and_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(world(20_000)))
    process = subprocess.Popen(command(tmp_path / "s", path, extra=("--speed", "600")), stderr=subprocess.PIPE)
    while counted(tmp_path / "s") == 0 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and b"same command goes on" in error
    subprocess.run(command(tmp_path / "s", path), check=True, capture_output=True)
    replay(tmp_path / "w", path)
    assert answers(tmp_path / "s") == answers(tmp_path / "w")


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds

    def clock(self) -> Clock:
        return Clock(wall_ms=lambda: T0 + 10**9, monotonic=lambda: self.now, sleep=self.sleep)


def test_speed_is_log_time_over_wall_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([watch("u", str(i), T0 + i * MINUTE) for i in range(61)]))
    fake = FakeTime()
    replay(tmp_path / "s", path, speed=60.0, clock=fake.clock())
    assert 60.0 <= fake.slept <= 61.0


def test_standard_input_goes_on_after_what_was_read(log: Path, tmp_path: Path) -> None:
    data = log.read_bytes()
    half = data[: data.index(b"\n", len(data) // 2) + 1]
    for part in (half, data):
        subprocess.run(command(tmp_path / "s", "-", extra=("--no-flush",) if part is half else ()), input=part, check=True,
                       capture_output=True)
    replay(tmp_path / "w", log)
    assert answers(tmp_path / "s") == answers(tmp_path / "w")


def run(*arguments: object, data: bytes | None = None, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "onerec.cli", *map(str, arguments)], capture_output=True, input=data, timeout=120,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("missing.jsonl", None, b"No such file"),
        ("empty.jsonl", b"", b"is empty"),
        ("utf16.jsonl", '{"type":"watch"}\n'.encode("utf-16"), b"UTF-16"),
        ("cut.jsonl.gz", gzip.compress(os.urandom(200_000))[:100_000], b"ends too early"),
        ("cut.jsonl.zst", zstandard.ZstdCompressor().compress(os.urandom(200_000))[:100_000], b"ends too early"),
        ("columns.csv", b"a,b,c\n1,2,3\n", b"--map a="),
        ("whole.parquet", b"PAR1 and nothing more", b"no whole Parquet file"),
    ],
)
def test_unusable_files_are_told_with_the_remedy(tmp_path: Path, name: str, data: bytes | None, message: bytes) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    result = run("replay", tmp_path / name, "--state", tmp_path / "s")
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    assert b"Traceback" not in result.stderr


def test_a_truncated_log_keeps_what_came_before_and_goes_on_when_whole(tmp_path: Path) -> None:
    data = gzip.compress(lines(world(30_000)), mtime=0)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data[: len(data) * 2 // 3])
    result = run("replay", path, "--state", tmp_path / "s")
    assert result.returncode == 2 and b"run the same command again" in result.stderr
    path.write_bytes(data)
    assert run("replay", path, "--state", tmp_path / "s").returncode == 0
    replay(tmp_path / "w", path)
    assert answers(tmp_path / "s") == answers(tmp_path / "w")


def test_a_line_of_10_mb_is_one_dead_letter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = lines([watch("u", "a", T0)])
    path.write_bytes(good + b'{"x":"' + b"y" * 10_000_000 + b'"}\n' + good.replace(b'"a"', b'"b"'))
    assert replay(tmp_path / "s", path)["dead_letters"] == 1
    with Reader(tmp_path / "s") as reader:
        ((_, letter),) = reader.dead_letters()
        assert letter.reason == "too_long" and len(letter.raw) == 10_000_008
        assert list(reader.users()) == [("u", ["a", "b"])]


def test_a_mis_encoded_line_is_a_dead_letter_with_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = '{"type":"like","user_id":"é","item_id":"a","ts":1700000000000}'.encode("latin-1")
    path.write_bytes(b"\xef\xbb\xbf" + lines([watch("u", "a", T0)]) + bad + b"\n \t\r\n")
    summary = replay(tmp_path / "s", path)
    assert (summary["events"], summary["dead_letters"]) == (1, 1)
    with Reader(tmp_path / "s") as reader:
        (entry,) = letters(reader)
        assert entry["reason"] == "not_json" and entry["source"].endswith("a.jsonl:2") and "base64" in entry


def test_a_clock_in_the_future_is_refused_and_redriven_when_its_time_has_come(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    ahead = T0 + 3_600_000
    path.write_bytes(lines([watch("u", "a", T0), watch("u", "b", ahead), watch("u", "c", T0 + 1)]))
    clock = FakeTime().clock()._replace(wall_ms=lambda: T0 + 1_000)
    assert replay(tmp_path / "s", path, clock=clock)["dead_letters"] == 1
    with Store(tmp_path / "s", Semantics()) as store:
        assert redriven(store, now_ms=T0 + 1_000) == {"redriven": 0, "refused": 1}
        assert store.counters().dead_letters == 1
        assert redriven(store, now_ms=ahead) == {"redriven": 1, "refused": 0}
        assert store.counters().dead_letters == 0 and store.counters().events == 3
        assert list(store.dead_letters()) == []
        assert store.history("u") == ["a", "c", "b"]


def test_dead_letters_with_other_keys_are_redriven_by_map(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"type":"like","uid":"u","item_id":"a","ts":%d}\n' % T0)
    run("replay", path, "--state", tmp_path / "s")
    shown = run("dead-letters", "--state", tmp_path / "s", "--json")
    assert json.loads(shown.stdout)["reason"] == "bad_user_id"
    mended = run("dead-letters", "--redrive", "--map", "uid=user_id", "--state", tmp_path / "s", "--json")
    assert json.loads(mended.stdout) == {"redriven": 1, "refused": 0}
    assert json.loads(run("history", "u", "--state", tmp_path / "s", "--json").stdout) == {"user_id": "u", "items": ["a"]}


def test_other_settings_are_refused_and_named(log: Path, tmp_path: Path) -> None:
    assert run("replay", log, "--state", tmp_path / "s", "--set", "session.gap_ms=60000").returncode == 0
    before = answers(tmp_path / "s")
    result = run("replay", log, "--state", tmp_path / "s")
    assert result.returncode == 2 and b"session.gap_ms is 60000, asked 1800000" in result.stderr
    assert answers(tmp_path / "s") == before


@pytest.mark.parametrize(
    "setting, message",
    [
        ("session.gapms=1", b"gapms"),
        ("session.gap_ms=soon", b"session.gap_ms"),
        ("session.gap_ms=-1", b"session.gap_ms"),
        ("nonsense", b"section.key=value"),
    ],
)
def test_a_wrong_setting_names_the_key(log: Path, tmp_path: Path, setting: str, message: bytes) -> None:
    result = run("replay", log, "--state", tmp_path / "s", "--set", setting)
    assert result.returncode == 2 and message in result.stderr and not (tmp_path / "s").exists()


def test_a_second_writer_is_told_so_in_words(log: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "s", Semantics()):
        result = run("replay", log, "--state", tmp_path / "s")
    assert result.returncode == 2 and b"being written by another process" in result.stderr


@pytest.mark.parametrize("content", ["file", "folder"])
def test_a_foreign_folder_is_refused(log: Path, tmp_path: Path, content: str) -> None:
    state = tmp_path / "s"
    (state / "db").mkdir(parents=True)
    ((state / "db" / "notes.txt") if content == "file" else (state / "notes.txt")).write_text("mine")
    if content == "folder":
        (state / "db").rmdir()
    result = run("replay", log, "--state", state)
    assert result.returncode == 2 and b"give --state another folder" in result.stderr
    assert len(list(state.rglob("notes.txt"))) == 1


def test_a_state_of_an_older_format_is_refused_with_the_remedy(log: Path, tmp_path: Path) -> None:
    replay(tmp_path / "s", log)
    with Store(tmp_path / "s", Semantics()) as store:
        store._database.meta.put(b"format", b"0")
    result = run("replay", log, "--state", tmp_path / "s")
    assert result.returncode == 2 and b"has format 0" in result.stderr and b"replay the log into a new folder" in result.stderr
    assert run("sessions", "--state", tmp_path / "s").returncode == 2


def test_a_reader_beside_the_writer_sees_every_commit_and_nothing_half(log: Path, tmp_path: Path) -> None:
    data = log.read_bytes().splitlines()
    with Store(tmp_path / "s", Semantics()) as store:
        core = store.core()
        store.commit(core, core.apply(list(enumerate(data[:10]))), {})
        with Reader(tmp_path / "s") as reader:
            for i in range(10, len(data), 500):
                store.commit(core, core.apply(list(enumerate(data[i : i + 500]))), {"x": {"bytes": i}})
                reader.refresh()
                assert reader.counters() == core.counters
                assert reader.last_sequence() == core.counters.sessions == sum(1 for _ in reader.sessions())
                assert reader.watermark() == core.watermark


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_full_disk_ends_with_a_failure_and_what_was_committed_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(world(20_000)))
    result = run("replay", path, "--state", tmp_path / "s", "--batch", 200, preexec_fn=limit_files)
    assert result.returncode == 1 and b"run the same command again" in result.stderr, result.stderr
    assert 0 < counted(tmp_path / "s") < 20_000
    assert run("replay", path, "--state", tmp_path / "s").returncode == 0
    replay(tmp_path / "w", path)
    assert answers(tmp_path / "s") == answers(tmp_path / "w")


def test_items_are_kept_apart_and_an_unchanged_entry_keeps_its_place(tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_bytes(lines([{"type": "item", "item_id": i, "ts": T0, "tags": ["t"], "embedding": [1.0, 2.0]} for i in "abc"]))
    path = tmp_path / "a.jsonl"
    changed = {"type": "item", "item_id": "b", "ts": T0 + 1, "tags": ["u"], "embedding": [1, 2]}
    wrong = {"type": "item", "item_id": "d", "ts": T0 + 1, "embedding": [1, 2, 3]}
    path.write_bytes(lines([watch("u", "a", T0), changed, wrong]))
    for _ in range(2):
        result = run("replay", path, "--items", items, "--state", tmp_path / "s", "--json")
        assert json.loads(result.stdout.splitlines()[-1])["events"] == 1, result.stderr
    with Reader(tmp_path / "s") as reader:
        found = [(sequence, item.item_id) for sequence, item in reader.items()]
        assert [name for _, name in found][:2] == ["a", "c"]
        assert [letter.reason for _, letter in reader.dead_letters()] == ["bad_embedding"]


def test_an_item_file_with_vectors_of_another_length_is_refused(tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    entry = {"type": "item", "item_id": "a", "embedding": [1.0]}
    items.write_bytes(lines([entry, {**entry, "item_id": "b", "embedding": [1.0, 2.0]}]))
    (tmp_path / "a.jsonl").write_bytes(lines([watch("u", "a", T0)]))
    result = run("replay", tmp_path / "a.jsonl", "--items", items, "--state", tmp_path / "s")
    assert result.returncode == 2 and b"line 2" in result.stderr and b"one length" in result.stderr


def test_kuairand_rows_become_a_watch_and_its_interactions_and_seeds_come_first(tmp_path: Path) -> None:
    header = "user_id,video_id,time_ms,play_time_ms,duration_ms,is_like,is_follow,is_forward,is_comment,is_hate,tab\n"
    (tmp_path / "events.csv").write_text(header + f"1,5,{T0},9000,0,1,0,1,0,1,1\n1,6,{T0 + 5},1,0,0,0,0,0,0,1\nbroken\n")
    (tmp_path / "history.jsonl").write_text(json.dumps(
        {"user_id": 1, "last_time_ms": T0 - 10, "long_watch_seq": [3, 4], "like_seq": [3]}) + "\n")
    summary = replay(tmp_path / "s", tmp_path / "history.jsonl", tmp_path / "events.csv", wanted="kuairand")
    assert (summary["events"], summary["dead_letters"], summary["users"]) == (5, 1, 1)
    with Reader(tmp_path / "s") as reader:
        ((_, session),) = reader.sessions()
        assert session.history == ["4", "3"]
        assert session.items[0].interactions == ["dislike", "like", "share"] and session.interactions == 2
        assert reader.history("1") == ["4", "3", "5"]
        assert [letter.reason for _, letter in reader.dead_letters()] == ["bad_columns"]


def test_the_flags_of_a_row_count_though_its_watch_is_refused(tmp_path: Path) -> None:
    header = "user_id,video_id,time_ms,play_time_ms,duration_ms,is_like,is_follow,is_forward,is_comment,is_hate\n"
    (tmp_path / "events.csv").write_text(header + f"1,5,{T0},-1,0,1,0,0,0,0\n1,6,soon,1,0,1,0,0,0,0\n")
    summary = replay(tmp_path / "s", tmp_path / "events.csv", wanted="kuairand")
    assert (summary["events"], summary["dead_letters"]) == (1, 3)
    with Reader(tmp_path / "s") as reader:
        assert reader.history("1") == ["5"]
        assert [letter.reason for _, letter in reader.dead_letters()] == ["bad_watch_ms", "bad_ts", "bad_ts"]


def test_flush_can_be_left_out_and_done_later(log: Path, tmp_path: Path) -> None:
    with_rest = replay(tmp_path / "s", log, flush=False)
    whole = replay(tmp_path / "w", log)
    assert with_rest["sessions"] < whole["sessions"]
    replay(tmp_path / "s", log)
    assert answers(tmp_path / "s") == answers(tmp_path / "w")


def test_a_future_bound_wider_than_the_lateness_is_cut_to_it() -> None:
    assert StreamConfig(max_out_of_orderness_ms=10).future_ms == 10
    assert SessionConfig(gap_ms=5, feedback_delay_ms=50).feedback_ms == 5


@pytest.mark.parametrize(("source", "command"), [("feed", "feed"), ("replica", "histories-replica")])
def test_a_copy_of_kafka_takes_no_other_log(tmp_path: Path, source: str, command: str) -> None:
    with Store(tmp_path / "state", Semantics()) as store:
        store.append([], {source: {}}, watermark=None)
        with pytest.raises(UserError, match=f"onerec {command}"):
            store.core()
