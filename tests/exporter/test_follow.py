"""A publisher that follows: what is new is published once, in time; whatever goes wrong is said once and outlived."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from release_helpers import SESSIONS, WIDTH, World, add_items, add_sessions, noise

from exporter import bundle
from exporter.client import Client
from exporter.follow import POLL_SECONDS, Follower, Trouble
from exporter.lineage import answered
from exporter.override import promote, rollback
from exporter.publish import load_repository
from exporter.publisher import Outcome, Publisher
from exporter.release import status
from exporter.repository import Repository
from exporter.server import TritonServer
from exporter.tracing import GraphPlan
from exporter.weights import template_key
from onerec.errors import Failure, UserError
from trainer.config import PreferenceConfig, RewardConfig, TrainConfig
from trainer.runs import Run, write_run

Act = Callable[[], object]

pytestmark = pytest.mark.slow


class Story:
    """Drives a follower by a clock of its own: `acts` happen at their second, the follower ends at `until`."""

    def __init__(self, publisher: Publisher, *, until: float, server: str | None = None, every: float = 10.0,
                 items_every: float = 2.0, acts: dict[float, Act] | None = None) -> None:  # fmt: skip
        self.now = 0.0
        self.outcomes: list[tuple[int, Outcome]] = []
        self.troubles: list[tuple[int, Trouble | None]] = []
        self._acts = sorted((acts or {}).items())
        Follower(
            publisher, server=server, every_s=every, items_every_s=items_every,
            tell=lambda outcome: self.outcomes.append((round(self.now), outcome)),
            complain=lambda trouble: self.troubles.append((round(self.now), trouble)),
            stopped=lambda: self.now >= until, clock=lambda: self.now, sleep=self._sleep,
        ).run()  # fmt: skip

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        while self._acts and self._acts[0][0] <= self.now + 1e-6:
            self._acts.pop(0)[1]()

    @property
    def published(self) -> list[tuple[int, int, bool]]:
        """(second, step, only items) of each version."""
        return [(now, found.manifest.step, found.items_only) for now, found in self.outcomes if found.kind == "published"]

    @property
    def said(self) -> list[str | None]:
        """The beginning of what was complained of, None where it was over."""
        return [None if trouble is None else trouble.text for _, trouble in self.troubles]


def test_checkpoints_are_followed_as_they_appear_but_not_more_often_than_asked(world: World) -> None:
    acts: dict[float, Act] = {
        3: lambda: world.checkpoint(1), 5: lambda: world.checkpoint(2, seed=2), 9: lambda: world.checkpoint(3, seed=3),
        25: lambda: world.checkpoint(4, seed=4),
    }  # fmt: skip
    with world.publisher() as publisher:
        story = Story(publisher, until=40, acts=acts)
    assert story.published == [(3, 1, False), (13, 3, False), (25, 4, False)], "within a poll; step 2 was overtaken"
    assert story.said == [f"waiting for the first checkpoint in {world.run}", None]
    found = [outcome.sequences for _, outcome in story.outcomes]
    assert found == [None, (24, 24), (24, 24)], "sessions that are new, (after, up to]"


def test_the_graph_is_traced_while_the_first_checkpoint_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world.checkpoint(1)
    shutil.rmtree(made.path)
    whole = shutil.move(world.repository / ".onerec" / "templates", world.repository / "traced")

    def trace(plan: GraphPlan, templates: Path, **_: object) -> Path:
        """Tracing takes 20 s; the very same template is copied."""
        return Path(shutil.copytree(Path(whole) / template_key(plan), templates / template_key(plan)))

    run = Run(
        state=str(world.state), codebook_version=made.codebook_version, model=made.model_config, config=TrainConfig(),
        precision="fp32", reward=RewardConfig(), reward_model=None, preference=PreferenceConfig(),
    )  # fmt: skip
    steps: list[str] = []
    with world.publisher(report=lambda step, seconds: steps.append(step)) as publisher:
        with monkeypatch.context() as patched:
            patched.setattr("exporter.export.find_template", trace)
            Story(publisher, until=3, acts={1: lambda: write_run(world.run, run)})
        place = Repository(world.repository)
        assert [entry.name for entry in place.templates.iterdir()] == os.listdir(whole)
        assert not place.tracing.exists()
        world.checkpoint(1)
        assert Story(publisher, until=1).published == [(0, 1, False)]
    assert "seal" in steps and "template" not in steps


def test_new_items_are_published_in_between_with_the_very_same_graph_and_weights(world: World) -> None:
    world.checkpoint(1)
    acts: dict[float, Act] = {1: lambda: add_items(world.state, "new1", "new2"), 7: lambda: add_items(world.state, "new3")}
    with world.publisher() as publisher:
        story = Story(publisher, until=12, every=100, acts=acts)
    assert story.published == [(0, 1, False), (2, 1, True), (8, 1, True)]
    place = Repository(world.repository)
    first, last = place.versions()[0], place.versions()[-1]
    before, after = bundle.verify_bundle(place.folder(first)), bundle.verify_bundle(place.folder(last))
    assert before.weights == after.weights
    for name in before.files:
        if name.startswith("graph/"):
            assert after.files[name] == before.files[name]
            assert place.folder(first).joinpath(name).samefile(place.folder(last).joinpath(name)), "no copy was made"
    held = bundle.read_catalogue(place.folder(last)).item_ids
    assert {"new1", "new2", "new3"} <= set(held) and after.items == len(held) == before.items + (3 if first == 1 else 1)
    assert (after.sequence, after.watermark, after.gate) == (before.sequence, before.watermark, before.gate)
    assert not {"parity", "gate", "weights", "checkpoint"} & story.outcomes[-1][1].seconds.keys()


def test_a_held_candidate_is_told_once_and_items_go_on_with_the_served_weights(world: World) -> None:
    world.checkpoint(1)
    acts: dict[float, Act] = {
        4: lambda: world.checkpoint(2, change=noise), 20: lambda: add_items(world.state, "new"),
        30: lambda: world.checkpoint(3, seed=3),
    }  # fmt: skip
    with world.publisher() as publisher:
        story = Story(publisher, until=45, acts=acts)
    assert [(found.kind, found.manifest.step, found.items_only) for _, found in story.outcomes] == [
        ("published", 1, False), ("held", 2, False), ("published", 1, True), ("published", 3, False),
    ]  # fmt: skip
    times = [now for now, _ in story.outcomes]
    assert times[:2] == [0, 10] and 20 <= times[2] <= 23 and times[3] == 30
    with world.publisher() as publisher:
        assert Story(publisher, until=3).outcomes == [], "a restarted publisher has nothing to do"


def test_a_damaged_checkpoint_is_said_once_and_the_next_one_is_published_at_once(world: World) -> None:
    world.checkpoint(1)

    def damage() -> None:
        (world.checkpoint(2).path / "model.safetensors").write_bytes(b"no")

    with world.publisher() as publisher:
        story = Story(publisher, until=80, acts={5: damage, 70: lambda: world.checkpoint(3, seed=3)})
    assert story.published == [(0, 1, False), (70, 3, False)]
    [fault, over] = story.said
    assert fault is not None and "checkpoint of step 2 is damaged, and version 1 of step 1" in fault and over is None


def test_a_hold_is_said_once_and_ended_by_a_promote(world: World) -> None:
    world.checkpoint(1)
    acts: dict[float, Act] = {
        5: lambda: world.checkpoint(2, seed=2), 15: lambda: rollback(world.repository, reason="bad"),
        22: lambda: world.checkpoint(3, seed=3), 40: lambda: promote(world.repository, reason="mended"),
    }  # fmt: skip
    with world.publisher() as publisher:
        story = Story(publisher, until=50, acts=acts)
    assert [step for _, step, _ in story.published] == [1, 2, 3]
    assert 40 <= story.published[-1][0] <= 51
    assert len(story.said) == 2 and "on hold since version 2 was rolled back (bad)" in str(story.said[0])


def test_triton_is_waited_for(world: World) -> None:
    world.checkpoint(1)
    with world.publisher(server="127.0.0.1:9") as publisher:
        story = Story(publisher, until=1, server="127.0.0.1:9")
    assert story.outcomes == [] and story.said == ["waiting for Triton at 127.0.0.1:9"]
    assert Repository(world.repository).versions() == []


def test_a_full_disk_is_said_once_and_outlived(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.checkpoint(1)
    real = bundle.write_catalogue

    def full(*arguments: object) -> bundle.Snapshot:
        raise OSError(28, "No space left on device", "staging")

    monkeypatch.setattr(bundle, "write_catalogue", full)
    mend: dict[float, Act] = {8.0: lambda: monkeypatch.setattr(bundle, "write_catalogue", real)}
    with world.publisher() as publisher:
        story = Story(publisher, until=40, every=1, acts=mend)
    assert story.published == [(pytest.approx(16, abs=8), 1, False)]
    assert len(story.said) == 2 and "No space left" in str(story.said[0]) and story.said[1] is None
    assert not any(Repository(world.repository).staging.iterdir())


def test_a_second_publisher_says_who_is_at_work_and_waits_or_fails(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as one, world.publisher() as other:
        at_work = one.alone()
        at_work.__enter__()
        with pytest.raises(Failure, match=f"another publisher is at work .process {os.getpid()}"), other.alone():
            pass
        story = Story(other, until=20, acts={6: lambda: at_work.__exit__(None, None, None)})
    assert f"process {os.getpid()}" in str(story.said[0]) and len(story.said) == 2
    [(when, _, _)] = story.published
    assert 6 <= when <= 8


def test_options_of_follow_alone_are_refused(world: World) -> None:
    from typer.testing import CliRunner

    from onerec.cli import build

    for arguments, fault in (
        (["--every", "3"], "belong to --follow"), (["--follow", "--checkpoint", str(world.run)], "one of the two"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=fault):
            CliRunner().invoke(
                build(), ["publish", "--run", str(world.run), "--repository", str(world.repository), *arguments],
                catch_exceptions=False,
            )  # fmt: skip


class Process:
    """`onerec publish --follow --json` as a process of its own; the next line that it prints, decoded."""

    def __init__(self, world: World, server: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "onerec.cli", "publish", "--follow", "--run", world.run, "--repository", world.repository,
             "--server", server, "--every", "0.1", "--items-every", "0.1", "--json", "--metrics-port", "0",
             "--set", f"metrics.folder={world.run}", "--set", f"beam.width={WIDTH}", "--set", "gate.sessions=16"],
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def line(self) -> dict:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def end(self, number: int) -> int:
        self._process.send_signal(number)
        return self._process.wait(300)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """Processes that are killed at the end of the test."""
    found: list[Process] = []
    yield found
    for process in found:
        process.end(signal.SIGKILL)


def test_a_following_process_killed_at_any_moment_leaves_whole_versions_and_its_successor_goes_on(
    world: World, processes: list[Process], scrape: Callable
) -> None:
    rng = random.Random(3)
    with TritonServer(world.repository, world.state) as server, Client(server.url) as client:
        load_repository(world.repository, client)
        place = Repository(world.repository)
        step = 0
        for _ in range(3):
            step += 1
            world.checkpoint(step, seed=step)
            process = Process(world, server.url)
            processes.append(process)
            told = process.line()
            assert (told["outcome"], told["step"]) == ("published", step)
            answer = client.recommend(history=[])
            assert answer.model_version == told["version"]
            # Somewhere in the work on the next version.
            step += 1
            world.checkpoint(step, seed=step)
            time.sleep(rng.uniform(0.2, 1.0))
            process.end(signal.SIGKILL)
            for version in place.versions():
                assert bundle.verify_bundle(place.folder(version)).version == version
            assert client.recommend(history=[]).model_version <= place.versions()[-1]
        process = Process(world, server.url)
        processes.append(process)
        deadline = time.monotonic() + 300
        while bundle.read_manifest(place.folder(place.versions()[-1])).step < step or status(world.repository).serving is None:
            assert time.monotonic() < deadline
            time.sleep(POLL_SECONDS)
        add_items(world.state, "brand-new")
        told = process.line()
        while told["items"] != 31:
            told = process.line()
        version, lineage = answered(world.repository, server.url)
        assert version == told["version"] == client.recommend(history=["brand-new"]).model_version
        assert (lineage["step"], lineage["state"], lineage["items"]) == (step, "serving", 31)
        served = scrape((world.run / "publish.address").read_text().split()[0])
        assert served("onerec_published_version") == version
        assert served("onerec_gate_failed") == served("onerec_publishing_on_hold") == 0
        assert served("onerec_publishes_total", outcome="published") >= 1
        assert served("onerec_publish_interval_seconds") == pytest.approx(0.1)
        assert served("onerec_age_seconds_count", stage="loaded") is None, "nothing was learnt since the first version answered"

        add_sessions(world.state, range(SESSIONS, SESSIONS + 2))
        world.checkpoint(step + 1, seed=99, sequence=SESSIONS + 2)
        good = process.line()
        assert (good["outcome"], good["step"]) == ("published", step + 1)
        world.checkpoint(step + 2, change=noise, sequence=SESSIONS + 2)
        poisoned = process.line()
        assert (poisoned["outcome"], poisoned["step"]) == ("held", step + 2) and "gate.worse" in poisoned["reason"]
        assert client.recommend(history=[]).model_version == good["version"], "the one before answers on"
        served = scrape((world.run / "publish.address").read_text().split()[0])
        assert served("onerec_gate_failed") == 1 and served("onerec_publishes_total", outcome="held") == 1
        for stage in ("exported", "loaded"):
            assert served("onerec_age_seconds_count", stage=stage) == 12, "the watches of two sessions"
        done = promote(world.repository, reason="only a test", server=server.url)
        assert done.candidate == poisoned["version"]
        assert client.recommend(history=[]).model_version == done.version
        assert answered(world.repository, server.url)[1]["reason"] == "only a test"
        assert process.end(signal.SIGTERM) == 0
    assert not any(place.staging.iterdir())
    assert "rejected" not in [event.event for event in place.events()]
