"""People overrule the gate and the publisher, with a reason that is kept; a rollback leaves a bad model, not a catalogue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from release_helpers import World, add_items, noise
from serving_helpers import FakeCatalogue, expected_session, make_bundle, set_aside
from typer.testing import CliRunner

from exporter import bundle
from exporter.client import Client
from exporter.export import Expected
from exporter.override import promote, rollback
from exporter.publish import load_repository, publish_bundle
from exporter.release import HeldBack, OnHold, status
from exporter.repository import KEEP_VERSIONS, Repository
from exporter.server import TritonServer
from onerec.cli import build as build_cli
from onerec.errors import OneRecError, UserError

pytestmark = pytest.mark.slow


def hold_one_back(world: World) -> None:
    """Version 1 serves, version 2 is held back."""
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
        world.checkpoint(2, change=noise)
        with pytest.raises(HeldBack):
            publisher.publish()


def events(world: World) -> list[tuple[str, int, str]]:
    return [(event.event, event.version, event.reason) for event in Repository(world.repository).events()]


def test_a_held_version_is_promoted_under_the_next_number_and_keeps_the_reason(world: World) -> None:
    hold_one_back(world)
    held = bundle.read_manifest(world.repository / ".onerec" / "held" / "2")
    done = promote(world.repository, 2, reason="  the log\n was faulty ")
    assert (done.candidate, done.version, done.lifted) == (2, 3, False)
    served = bundle.verify_bundle(Repository(world.repository).folder(3))
    assert (served.weights, served.step, served.gate) == (held.weights, 2, held.gate)
    assert (served.version, served.before, served.promoted_from, served.reason) == (3, 1, 2, "the log was faulty")
    now = status(world.repository)
    assert not now.failed and not now.held
    assert [(info.version, info.state) for info in now.versions] == [(3, "serving"), (2, "gone"), (1, "previous")]
    assert events(world)[-2:] == [("promoted", 3, "the log was faulty"), ("promoted", 2, "as version 3: the log was faulty")]
    assert now.versions[0].reason == "the log was faulty"
    world.checkpoint(3, seed=2)
    with world.publisher() as publisher:
        scores = publisher.publish().scores
    assert scores is not None and scores.served_version == 3, "the next one is compared with what was promoted"
    assert scores.served == pytest.approx(held.gate.candidate if held.gate else None)


def test_without_a_number_the_newest_held_version_is_meant(world: World) -> None:
    hold_one_back(world)
    assert promote(world.repository, reason="sure").candidate == 2


def test_there_must_be_something_to_promote_and_a_reason(world: World) -> None:
    hold_one_back(world)
    with pytest.raises(UserError, match="--reason is empty"):
        promote(world.repository, 2, reason=" ")
    with pytest.raises(UserError, match="--reason is empty"):
        rollback(world.repository, reason="")
    with pytest.raises(UserError, match="version 1 was neither held back nor rolled back.*held back are: 2"):
        promote(world.repository, 1, reason="no")
    promote(world.repository, reason="yes")
    with pytest.raises(UserError, match="nothing was held back and publishing is not on hold"):
        promote(world.repository, reason="again")


def test_a_damaged_candidate_is_not_promoted(world: World) -> None:
    hold_one_back(world)
    (world.repository / ".onerec" / "held" / "2" / "catalogue.npz").write_bytes(b"no")
    with pytest.raises(UserError, match="catalogue.npz is not what was published"):
        promote(world.repository, 2, reason="no")
    assert Repository(world.repository).versions() == [1]


def test_a_rollback_leaves_all_versions_of_the_bad_weights_and_holds_until_a_promote(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
        world.checkpoint(2, seed=2)
        publisher.publish()
        for name in ("new1", "new2", "new3"):
            add_items(world.state, name)
            outcome = publisher.publish_items()
            assert outcome is not None and outcome.items_only
        assert Repository(world.repository).versions() == [1, 4, 5], "other weights stay, however many catalogues came"
        assert rollback(world.repository, reason="all answers alike") == ([4, 5], 1)
        hold = status(world.repository).hold
        assert hold is not None and (hold.reason, hold.left, hold.serving) == ("all answers alike", [4, 5], 1)
        assert "all answers alike" in set_aside(world.repository, 5)
        world.checkpoint(3, seed=3)
        for attempt in (publisher.publish, publisher.publish_items):
            with pytest.raises(OnHold, match="on hold since version 4, 5 was rolled back .all answers alike.; lift it: onerec"):
                attempt()
        assert Repository(world.repository).versions() == [1]
        done = promote(world.repository, reason="mended")
        assert (done.candidate, done.version, done.lifted) == (None, None, True)
        assert events(world)[-1] == ("hold lifted", 1, "mended")
        assert publisher.publish().version == 6


def test_a_rolled_back_version_can_be_promoted_again_which_lifts_the_hold(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
        world.checkpoint(2, seed=2)
        publisher.publish()
        taken = bundle.read_manifest(Repository(world.repository).folder(2)).weights
        rollback(world.repository, reason="looked bad")
        done = promote(world.repository, 2, reason="was good")
        assert (done.version, done.lifted) == (3, True)
        assert bundle.verify_bundle(Repository(world.repository).folder(3)).weights == taken
        assert publisher.settled_step() == 2, "what was taken back is not published again by itself"


def test_versions_says_what_was_held_back_and_that_publishing_is_on_hold(world: World) -> None:
    def shown() -> str:
        result = CliRunner().invoke(build_cli(), ["versions", "--repository", str(world.repository)], catch_exceptions=False)
        return " ".join(result.stdout.split())

    hold_one_back(world)
    assert "2 held 2" in shown() and "on hold" not in shown()
    world.checkpoint(3, seed=3)
    with world.publisher() as publisher:
        publisher.publish()
    rollback(world.repository, reason="too many cats")
    assert "on hold since" in shown() and "UTC: too many cats; go on: onerec promote" in shown()


def test_weights_that_were_taken_back_are_not_published_again_by_a_restarted_publisher(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
        world.checkpoint(2, seed=2)
        publisher.publish()
    rollback(world.repository, reason="bad")
    promote(world.repository, reason="go on")
    with world.publisher() as publisher:
        assert publisher.newest_step() == publisher.settled_step() == 2


def test_a_hold_that_cannot_be_read_still_holds(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
        (world.repository / ".onerec" / "hold.json").write_text("{")
        with pytest.raises(OnHold, match=r"hold\.json cannot be read"):
            publisher.publish()
    promote(world.repository, reason="it was I")
    assert status(world.repository).hold is None


def test_there_is_no_way_back_to_the_same_weights(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
        add_items(world.state, "new")
        publisher.publish_items()
    with pytest.raises(UserError, match=r"2 version\(s\) of one model"):
        rollback(world.repository, reason="bad")
    assert Repository(world.repository).versions() == [1, 2]
    assert status(world.repository).hold is None


def catalogue_only(shift: int) -> Callable[[Path, int], tuple[bundle.Manifest, Expected]]:
    """A `build` whose weights are the same for the same shift, and whose catalogue is its own."""

    def build(folder: Path, version: int) -> tuple[bundle.Manifest, Expected]:
        folder.rmdir()
        manifest = make_bundle(folder, version, shift=shift, catalogue=FakeCatalogue(revision=f"rev-{version}"))
        return manifest, Expected(history=[], sessions=[expected_session(shift)])

    return build


def asks_without_end(url: str, stop: threading.Event, seen: list[int], faults: list[str]) -> None:
    with Client(url) as client:
        while not stop.is_set():
            try:
                seen.append(client.recommend(history=[]).model_version)
            except OneRecError as error:
                faults.append(str(error))


def test_no_request_fails_when_several_catalogues_of_bad_weights_are_taken_back(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for shift in (1, 2, 2, 2, 2):
        publish_bundle(repository, catalogue_only(shift))
    assert Repository(repository).versions() == [1, 4, 5]
    seen: list[int] = []
    faults: list[str] = []
    stop = threading.Event()
    with TritonServer(repository) as server, Client(server.url) as client:
        load_repository(repository, client)
        asking = threading.Thread(target=asks_without_end, args=(server.url, stop, seen, faults))
        asking.start()

        def wait_for(version: int) -> None:
            deadline = time.monotonic() + 60
            while version not in seen:
                assert time.monotonic() < deadline, (seen[-1:], faults)
                time.sleep(0.01)

        try:
            wait_for(5)
            assert rollback(repository, reason="bad", server=server.url) == ([4, 5], 1)
            assert client.recommend(history=[]).items[0] == expected_session(1)
            done = promote(repository, 5, reason="good after all", server=server.url)
            assert client.recommend(history=[]).model_version == done.version == 6
            assert client.recommend(history=[]).items[0] == expected_session(2)
            wait_for(6)
        finally:
            stop.set()
            asking.join()
    assert faults == []


def test_only_the_newest_of_each_weights_stays_on_the_disk(tmp_path: Path) -> None:
    for shift in (1, 2, 3, 4, 4, 5, 5, 5):
        publish_bundle(tmp_path, catalogue_only(shift))
    assert Repository(tmp_path).versions() == [3, 5, 7, 8]
    kept = [bundle.read_manifest(Repository(tmp_path).folder(version)).weights for version in (3, 5, 8)]
    assert len(set(kept)) == KEEP_VERSIONS


def test_formats_before_lineage_serve_on(tmp_path: Path) -> None:
    publish_bundle(tmp_path, catalogue_only(1))
    path = Repository(tmp_path).folder(1) / bundle.MANIFEST_FILE
    manifest = bundle.read_manifest(path.parent)
    bundle.write_manifest(path.parent, msgspec.structs.replace(manifest, format=2))
    assert bundle.verify_bundle(path.parent).sequence is None
