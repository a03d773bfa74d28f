"""`history_watermark`: how far a host's stored histories reach, told with every answer, by versions that know it."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from serving_helpers import builder, make_bundle

from exporter import bundle
from exporter.client import Client
from exporter.publish import load_repository, publish_bundle
from exporter.server import TritonServer, find_installation
from onerec.errors import UserError
from serving_config.recommend.engine import Engine
from serving_config.recommend.errors import RequestError
from serving_config.recommend.histories import CATCH_UP_SECONDS, Histories
from serving_config.recommend.service import Answer, Request, Service
from streaming.semantics import Semantics
from streaming.store import Store

LATENESS = Semantics().stream.max_out_of_orderness_ms
START = 1_700_000_000_000


def event(ts: int) -> bytes:
    """A watch of one user."""
    return msgspec.json.encode({
        "event_id": f"e{ts}", "user_id": "u1", "item_id": "v1", "ts": ts, "type": "watch", "watch_ms": 30_000,
        "duration_ms": 30_000,
    })  # fmt: skip


class Writer:
    """A stream that writes a state."""

    def __init__(self, state: Path) -> None:
        self.store = Store(state, Semantics())
        self._core = self.store.core()

    def write(self, *times: int) -> None:
        """Take events in, one commit."""
        changes = self._core.apply([(ts, event(ts)) for ts in times], now_ms=START + 10**9)
        self.store.commit(self._core, changes, {})


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_is_the_newest_event_of_the_last_catch_up(tmp_path: Path) -> None:
    clock = Clock()
    writer = Writer(tmp_path / "state")
    histories = Histories(tmp_path / "state", clock=clock)
    assert histories.watermark() is None, "no event yet"
    writer.write(START + 5_000, START)
    clock.now += CATCH_UP_SECONDS
    histories.catch_up()
    assert histories.watermark() == START + 5_000
    writer.write(START + 60_000)
    histories.catch_up()
    assert histories.watermark() == START + 5_000, "no look has been due, so histories are as they were"
    clock.now += CATCH_UP_SECONDS
    histories.catch_up()
    assert histories.watermark() == START + 60_000
    histories.close()
    assert histories.watermark() is None
    writer.store.close()


def test_it_is_told_with_every_row_and_minus_one_without_a_state(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "state")
    writer.write(START)
    writer.store.close()
    make_bundle(tmp_path / "1")
    history = np.array([[b"v1"], [b"v2"]], dtype=object)
    for state, expected in ((tmp_path / "state", START), (None, -1), (tmp_path / "nothing", -1)):
        histories = Histories(state)
        [answer], _ = Service(Engine(tmp_path / "1"), histories).answer([Request(history=history)])
        assert isinstance(answer, Answer)
        assert answer.history_watermark.tolist() == [[expected], [expected]]
        assert answer.history_watermark.dtype == np.int64
        histories.close()


def test_who_asks_only_about_the_version_gets_it_without_a_search(tmp_path: Path) -> None:
    make_bundle(tmp_path / "1")
    engine = Engine(tmp_path / "1")
    service = Service(engine, Histories(None))
    history = np.array([[b"v1"], [b"v2"]], dtype=object)
    [whole], _ = service.answer([Request(history=history)])
    rows: list[int] = []
    search = engine.search
    engine.search = lambda found: rows.append(len(found)) or search(found)  # type: ignore[method-assign, func-returns-value]
    [told], _ = service.answer([Request(history=history, sessions=False)])
    assert rows == []
    assert isinstance(whole, Answer) and isinstance(told, Answer)
    assert told.items.shape == (2, 0, engine.manifest.model_config.session_items) and told.rewards.shape == (2, 0, 4)
    for name in ("model_version", "watermark", "history_watermark"):
        np.testing.assert_array_equal(getattr(told, name), getattr(whole, name))
    answers, counts = service.answer([
        Request(history=history, sessions=False), Request(history=history), Request(sessions=False),
        Request(history=history[:1]),
    ])  # fmt: skip
    assert rows == [3] and counts["refused"] == 1 and isinstance(answers[2], RequestError)
    assert [len(answer.items) for answer in answers if isinstance(answer, Answer)] == [2, 2, 1]
    np.testing.assert_array_equal(answers[1].items, whole.items)


def without_it(folder: Path) -> None:
    """A sealed bundle whose own modules are from before there was this output."""
    module = folder / "lib" / "serving_config" / "recommend" / "service.py"
    lines = module.read_text().splitlines(keepends=True)
    module.write_text("".join(line for line in lines if "history_watermark=" not in line and
                              "history_watermark: NDArray" not in line))
    manifest = bundle.read_manifest(folder)
    bundle.write_manifest(folder, msgspec.structs.replace(manifest, files=bundle.digest_files(folder)))


@pytest.mark.slow
def test_versions_with_and_without_it_are_served_side_by_side(tmp_path: Path) -> None:
    try:
        find_installation()
    except UserError as error:
        pytest.skip(str(error))
    writer = Writer(tmp_path / "state")
    writer.write(START)
    repository = tmp_path / "repository"
    assert publish_bundle(repository, builder(spoil=without_it)) == 1
    with TritonServer(repository, tmp_path / "state") as server, Client(server.url) as client:
        load_repository(repository, client)
        old = client.recommend(user_id="u1")
        assert (old.model_version, old.watermark, old.history_watermark) == (1, 1_000, None)
        told = client.tell(user_id="u1")
        assert (told.model_version, told.watermark, told.history_watermark) == (1, 1_000, None)
        assert publish_bundle(repository, builder(), server=server.url) == 2
        assert client.recommend(user_id="u1").history_watermark == START
        writer.write(START + LATENESS)
        assert client.recommend(user_id="u1", version=1).history_watermark is None
        time.sleep(CATCH_UP_SECONDS)
        assert client.recommend(user_id="u1").history_watermark == START + LATENESS
        told = client.tell(user_id="u1")
        assert (told.model_version, told.watermark, told.history_watermark) == (2, 1_000, START + LATENESS)
        assert client.tell(history=[]).model_version == 2
        with pytest.raises(UserError, match="empty"):
            client.tell(user_id="")
    writer.store.close()
