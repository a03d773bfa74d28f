"""A reader beside a live writer sees what is committed, also what the writer has moved from its log into files since."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rocksdict import DbClosedError

from streaming.items import ItemRecord
from streaming.replay import Replay
from streaming.semantics import Semantics
from streaming.store import Reader, Store


def item(duration_ms: int) -> ItemRecord:
    return ItemRecord(item_id="i", ts=1, duration_ms=duration_ms, tags=[], embedding=None)


def flush(store: Store) -> None:
    """As RocksDB does once its memtables are full."""
    store._database.db.flush()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "state", Semantics())
    store.append([], {"s": {"offset": 1}}, watermark=1_000, items=[item(1)])
    yield store
    with suppress(DbClosedError):
        store.close()


@pytest.mark.parametrize("end", [flush, Store.close], ids=["flush", "close"])
def test_what_was_flushed_since_the_last_look_is_seen(store: Store, end: object) -> None:
    with Reader(store.state) as reader:
        store.append([], {"s": {"offset": 2}}, watermark=2_000, items=[item(2)])
        reader.refresh()
        assert reader.watermark() == 2_000
        store.append([], {"s": {"offset": 3}}, watermark=3_000, items=[item(3)])
        end(store)  # type: ignore[operator]
        reader.refresh()
        assert reader.watermark() == 3_000 and reader.positions() == {"s": {"offset": 3}}
        assert [(sequence, found.duration_ms) for sequence, found in reader.items()] == [(3, 3)]


def test_a_reader_follows_a_writer_that_flushes_all_the_time(store: Store) -> None:
    with Reader(store.state) as reader:
        for watermark in range(2_000, 2_060):
            store.append([], {}, watermark=watermark)
            if watermark % 3 == 0:
                flush(store)
            reader.refresh()
            assert reader.watermark() == watermark


def test_what_is_being_read_goes_on_as_of_before(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(
        f'{{"type":"watch","user_id":"u{n}","item_id":"i","ts":{10**12 + n},"watch_ms":5000,"duration_ms":9000}}\n'
        for n in range(6)
    ))
    with Store(tmp_path / "state", Semantics()) as store, Reader(tmp_path / "state") as reader:
        Replay(store, [str(log)]).run()
        reader.refresh()
        users = reader.users()
        first = next(users)
        store.append([], {}, watermark=2 * 10**12)
        flush(store)
        reader.refresh()
        assert reader.watermark() == 2 * 10**12
        assert [name for name, _ in (first, *users)] == [f"u{n}" for n in range(6)]


def test_a_reader_leaves_nothing_behind(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "own"))
    with Reader(store.state) as reader:
        store.append([], {}, watermark=2_000)
        flush(store)
        reader.refresh()
        assert len(list((tmp_path / "own").iterdir())) == 1
    assert not list((tmp_path / "own").iterdir())
