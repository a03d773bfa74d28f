"""From an answer back to what it was made of."""

from __future__ import annotations

import json
import shutil

import pytest
from release_helpers import ITEMS, SESSIONS, START, World, add_items, noise
from serving_helpers import as_format_1, make_bundle
from typer.testing import CliRunner

from exporter.lineage import lineage
from exporter.override import rollback
from exporter.release import HeldBack
from onerec.cli import build
from onerec.errors import UserError
from onerec.versions import code_version

pytestmark = pytest.mark.slow


def call(*arguments: object) -> str:
    result = CliRunner().invoke(build(), [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_version_leads_back_to_checkpoint_log_codebook_settings_and_code(world: World) -> None:
    world.checkpoint(1)
    checkpoint = world.checkpoint(2, seed=2)
    with world.publisher() as publisher:
        publisher.publish()
        add_items(world.state, "new")
        publisher.publish_items()
    first, second = lineage(world.repository, 1), lineage(world.repository)
    expected = {
        "version": 1, "state": "previous", "step": 2, "watermark": START + 2_000, "sequence": SESSIONS,
        "item_sequence": ITEMS, "checkpoint_created_ms": START + 2, "source": checkpoint.source,
        "codebook_version": checkpoint.codebook_version, "config_sha256": "c" * 64, "code_version": "0.1.0+abc",
        "exported_by": code_version(), "before": None, "reason": None, "promoted_from": None,
    }  # fmt: skip
    assert first == first | expected
    assert first["gate"]["candidate"] > 0 and first["gate"]["passed"]
    assert [event["event"] for event in first["history"]] == ["published"]
    changed = {"version": 2, "state": "serving", "item_sequence": ITEMS + 1, "items": ITEMS + 1, "before": 1}
    assert second == second | expected | changed
    assert second["weights_sha256"] == first["weights_sha256"]
    assert second["brought_ms"] == first["created_ms"] <= second["created_ms"]


def test_what_was_held_back_or_taken_back_has_its_lineage_too(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
        world.checkpoint(2, seed=2)
        publisher.publish()
        world.checkpoint(3, change=noise)
        with pytest.raises(HeldBack):
            publisher.publish()
    rollback(world.repository, reason="too many cats")
    taken, held = lineage(world.repository, 2), lineage(world.repository, 3)
    assert (taken["state"], taken["step"], held["state"], held["step"]) == ("rolled back", 2, "held", 3)
    assert [event["event"] for event in taken["history"]] == ["published", "rolled back"]
    assert "too many cats" in taken["history"][-1]["reason"]
    assert not held["gate"]["passed"] and "gate.worse" in held["history"][-1]["reason"]
    table = call("lineage", 2, "--repository", world.repository)
    assert "too many cats" in table and "log.jsonl" in table and "records 20" in table


def test_a_version_that_is_gone_is_known_by_its_record(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
    shutil.rmtree(world.repository / "recommend" / "1")
    found = lineage(world.repository, 1)
    assert (found["state"], found["step"], found["watermark"]) == ("gone", 1, START + 1_000)
    assert "no data" in call("lineage", 1, "--repository", world.repository)


def test_a_version_of_an_older_format_says_what_it_knows(world: World) -> None:
    folder = world.repository / "recommend" / "1"
    make_bundle(folder)
    as_format_1(folder)
    found = json.loads(call("lineage", "--repository", world.repository, "--json"))
    assert (found["format"], found["step"], found["sequence"], found["gate"]) == (1, 10, None, None)
    assert "no data" in call("lineage", "--repository", world.repository)


def test_an_unknown_version_is_a_user_error_that_names_the_known_ones(world: World) -> None:
    with pytest.raises(UserError, match="holds no versions"):
        lineage(world.repository)
    make_bundle(world.repository / "recommend" / "4", 4)
    with pytest.raises(UserError, match="knows no version 9; it knows 4 to 4"):
        lineage(world.repository, 9)
    with pytest.raises(UserError, match="one of the two"):
        call("lineage", 4, "--repository", world.repository, "--server", "127.0.0.1:9")
