"""The repository on disk, no server: whole versions only, one publisher at a time, numbers never used twice."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving_helpers import builder, make_bundle, set_aside

from exporter import bundle
from exporter.override import rollback
from exporter.publish import publish_bundle
from exporter.repository import KEEP_EVENTS, KEEP_REJECTED, KEEP_VERSIONS, Repository
from exporter.triton_config import RecommendConfig
from onerec.errors import Failure, UserError


def states(repository: Path) -> dict[int, str]:
    return {info.version: info.state for info in Repository(repository).infos()}


def test_versions_follow_each_other_and_the_old_ones_go(repository: Path) -> None:
    for version in range(2, KEEP_VERSIONS + 3):
        assert publish_bundle(repository, builder()) == version
    assert Repository(repository).versions() == [3, 4, 5]
    assert states(repository) == {5: "serving", 4: "previous", 3: "kept", 2: "gone", 1: "gone"}
    assert not any(Repository(repository).staging.iterdir())
    for version in Repository(repository).versions():
        assert bundle.verify_bundle(Repository(repository).folder(version)).version == version


def test_config_is_rewritten_only_when_it_changes(repository: Path) -> None:
    path = repository / "recommend" / "config.pbtxt"
    before = path.stat().st_mtime_ns
    publish_bundle(repository, builder())
    assert path.stat().st_mtime_ns == before
    publish_bundle(repository, builder(), config=RecommendConfig(max_batch=3))
    assert "max_batch_size: 3" in path.read_text()


def test_a_build_that_fails_leaves_everything_as_it_was(repository: Path) -> None:
    def build(folder: Path, version: int) -> None:
        (folder / "half").write_text("")
        raise UserError("mixed versions: no")

    with pytest.raises(UserError, match="mixed"):
        publish_bundle(repository, build)  # type: ignore[arg-type]
    assert states(repository) == {1: "serving"}
    assert not any(Repository(repository).staging.iterdir())
    assert publish_bundle(repository, builder()) == 2


def test_rollback_brings_the_version_before_and_never_reuses_a_number(repository: Path) -> None:
    publish_bundle(repository, builder())
    assert rollback(repository, reason="bad") == ([2], 1)
    assert states(repository) == {2: "rolled back", 1: "serving"}
    assert "rolled back to version 1" in set_aside(repository, 2)
    with pytest.raises(UserError, match="none before"):
        rollback(repository, reason="bad")
    assert publish_bundle(repository, builder()) == 3
    assert states(repository) == {3: "serving", 2: "rolled back", 1: "previous"}


def test_a_damaged_version_before_is_no_place_to_go_back_to(repository: Path) -> None:
    publish_bundle(repository, builder())
    (repository / "recommend" / "1" / "catalogue.npz").write_bytes(b"no")
    with pytest.raises(UserError, match=r"catalogue\.npz is not what was published"):
        rollback(repository, reason="bad")
    assert Repository(repository).versions() == [1, 2]


def test_rollback_of_nothing_says_publish(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="publish first"):
        rollback(tmp_path / "none", reason="bad")


def test_what_a_killed_publisher_left_is_settled(repository: Path) -> None:
    place = Repository(repository)
    (place.staging / "2-123").mkdir()
    make_bundle(place.folder(2), 2)
    make_bundle(place.folder(3), 3)
    (place.folder(3) / "graph" / "model.onnx").write_bytes(b"half")
    assert publish_bundle(repository, builder()) == 4
    assert states(repository) == {4: "serving", 3: "rejected", 2: "previous", 1: "kept"}
    assert [(event.event, event.version) for event in place.events()] == [
        ("published", 1), ("recovered", 2), ("rejected", 3), ("published", 4)
    ]  # fmt: skip
    assert "model.onnx" in set_aside(repository, 3)


def test_only_the_newest_rejected_stay_on_disk(repository: Path) -> None:
    place = Repository(repository)
    for _ in range(KEEP_REJECTED + 2):
        version = place.next_version()
        make_bundle(place.folder(version), version)
        place.set_aside(version, "no", 0.0)
    assert sorted(int(entry.name) for entry in place.rejected.iterdir()) == [4, 5, 6]
    assert states(repository) == {**dict.fromkeys(range(2, 7), "rejected"), 1: "serving"}
    assert place.next_version() == 7


def test_a_torn_line_of_the_record_costs_only_itself(repository: Path) -> None:
    path = repository / ".onerec" / "versions.jsonl"
    with path.open("ab") as file:
        file.write(b'{"event":"publ')
    publish_bundle(repository, builder())
    assert [event.version for event in Repository(repository).events()] == [1, 2]


def test_the_record_does_not_grow_without_end(repository: Path) -> None:
    place = Repository(repository)
    line = b'{"event":"published","version":%d,"at_ms":0}\n'
    (repository / ".onerec" / "versions.jsonl").write_bytes(b"".join(line % n for n in range(1, 2 * KEEP_EVENTS + 1)))
    place.record("published", 2 * KEEP_EVENTS + 1, 0.0, None)
    assert [event.version for event in place.events()] == list(range(KEEP_EVENTS + 2, 2 * KEEP_EVENTS + 2))
    assert place.next_version() == 2 * KEEP_EVENTS + 2


HOLD = """
import sys, time
from pathlib import Path
from exporter.repository import Repository
with Repository(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_publisher_is_told_who_is_at_work_and_a_killed_one_holds_nothing(repository: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(repository)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            with pytest.raises(Failure, match=f"another publisher.* is at work .process {holder.pid}"):
                publish_bundle(repository, builder())
            with pytest.raises(Failure, match="another publisher"):
                rollback(repository, reason="bad", lock_seconds=0)
        finally:
            holder.kill()
    assert publish_bundle(repository, builder()) == 2


def test_a_repository_that_cannot_be_written_is_a_user_error(unwritable: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written: Not a directory.*name a folder that you may write"):
        publish_bundle(unwritable, builder())


def test_a_config_that_cannot_be_written_leaves_the_version_out(repository: Path) -> None:
    path = repository / "recommend" / "config.pbtxt"
    path.unlink()
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        publish_bundle(repository, builder())
    assert Repository(repository).versions() == [1]


def test_a_full_disk_is_a_failure_and_changes_nothing(repository: Path) -> None:
    def build(folder: Path, version: int) -> None:
        (folder / "half").write_text("")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    with pytest.raises(Failure, match="No space left.*served version is as it was"):
        publish_bundle(repository, build)  # type: ignore[arg-type]
    assert states(repository) == {1: "serving"}
    assert not any(Repository(repository).staging.iterdir())


def test_versions_of_an_empty_or_missing_repository_are_none(tmp_path: Path) -> None:
    assert Repository(tmp_path / "missing").infos() == []
    (tmp_path / "empty").mkdir()
    assert Repository(tmp_path / "empty").infos() == []


def test_a_lost_record_is_made_again_from_the_folders(repository: Path) -> None:
    publish_bundle(repository, builder())
    shutil.rmtree(repository / ".onerec")
    assert states(repository) == {2: "serving", 1: "previous"}
    assert publish_bundle(repository, builder()) == 3
