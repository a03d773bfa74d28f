"""The gate lets through what is as good as the version served, and keeps the rest aside with its reason; nothing else moves."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from release_helpers import SESSIONS, World, add_sessions, noise, not_a_number, session

from exporter import bundle
from exporter.bundle import GateScores
from exporter.gate import Gate, NewestSessions, bundle_model, illegal, mean_loss
from exporter.override import promote
from exporter.release import HeldBack, status
from exporter.repository import Repository
from onerec.errors import UserError
from onerec.monitor.settings import GateConfig
from serving_config.recommend.engine import Beams, Graph
from streaming.store import Reader
from trainer.checkpoint import load_model
from trainer.data import session_examples

pytestmark = pytest.mark.slow


def scores_of(world: World, version: int) -> GateScores:
    found = bundle.read_manifest(Repository(world.repository).folder(version)).gate
    assert found is not None
    return found


def test_the_first_version_is_scored_and_compared_with_nothing(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as publisher:
        outcome = publisher.publish()
    scores = scores_of(world, 1)
    assert scores == outcome.scores
    assert scores.candidate == pytest.approx(np.log(8), rel=0.1), "an untrained model knows nothing of 8 codes a level"
    assert (scores.served, scores.served_version, scores.passed) == (None, None, True)
    assert (scores.sessions, scores.windows, scores.unseen) == (16, 16, 0)
    assert scores.latency_ms is not None and scores.latency_ms > 0


def test_a_poisoned_candidate_is_held_back_and_the_next_good_one_is_published(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
        before = bundle.verify_bundle(Repository(world.repository).folder(1))
        world.checkpoint(2, change=noise)
        with pytest.raises(HeldBack, match=r"version 2 was held back in .*version 1 serves on.*gate\.worse.*onerec promote 2"):
            publisher.publish()
        assert Repository(world.repository).versions() == [1]
        assert bundle.verify_bundle(Repository(world.repository).folder(1)) == before
        now = status(world.repository)
        [held] = now.held
        assert now.failed and held.version == 2 and held.step == 2 and "more than the served" in held.reason
        assert held.scores is not None and held.scores.candidate is not None and held.scores.served is not None
        assert held.scores.candidate > 1.05 * held.scores.served and not held.scores.passed
        assert held.scores.served == pytest.approx(scores_of(world, 1).candidate)
        [info, _] = now.versions
        assert (info.version, info.state, info.step) == (2, "held", 2) and "gate.worse" in info.reason
        assert bundle.verify_bundle(world.repository / ".onerec" / "held" / "2").gate == held.scores
        world.checkpoint(3, seed=2)
        outcome = publisher.publish()
    assert outcome.version == 3, "the number of a held version is not used again"
    assert outcome.manifest.before == 1
    assert not status(world.repository).failed


def test_with_the_gate_off_a_worse_candidate_is_scored_and_published(world: World) -> None:
    world.checkpoint(1)
    with world.publisher(enabled=False) as publisher:
        publisher.publish()
        world.checkpoint(2, change=noise)
        assert publisher.publish().version == 2
    assert not scores_of(world, 2).passed


def test_weights_that_are_no_numbers_are_held_back_and_nobody_can_promote_them(world: World) -> None:
    world.checkpoint(1)
    with world.publisher(enabled=False) as publisher:
        publisher.publish()
        world.checkpoint(2, change=not_a_number)
        with pytest.raises(HeldBack, match="not finite: 1 of "):
            publisher.publish()
    assert bundle.verify_bundle(world.repository / ".onerec" / "held" / "2").parity is None
    with pytest.raises(UserError, match="version 2 cannot be served"):
        promote(world.repository, 2, reason="why not")
    assert Repository(world.repository).versions() == [1]


def test_a_slow_candidate_is_held_back_even_as_the_first(world: World) -> None:
    world.checkpoint(1)
    with world.publisher(latency_ms=1e-3) as publisher:
        with pytest.raises(HeldBack, match=r"no version is served.*gate\.latency_ms"):
            publisher.publish()
    assert Repository(world.repository).versions() == []


def test_a_graph_that_answers_unlike_torch_is_held_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Graph.search

    def other(self: Graph, histories: list[np.ndarray]) -> Beams:
        found = search(self, histories)
        return Beams(found.leaves, found.scores + np.float32(0.01))

    monkeypatch.setattr(Graph, "search", other)
    world.checkpoint(1)
    with world.publisher() as publisher, pytest.raises(HeldBack, match="parity: scores of history 0 differ by 0.01"):
        publisher.publish()
    [held] = status(world.repository).held
    assert held.scores is None and "parity" in held.reason


def test_answers_that_the_catalogue_does_not_hold_are_illegal(small_world: World) -> None:
    snapshot = bundle.read_catalogue(small_world.repository / "recommend" / "1")
    leaves = snapshot.trie.leaves
    scores = np.zeros((1, 2), np.float32)
    assert illegal(Beams(np.array([[[0, 1, 2], [-1, -1, -1]]]), scores), snapshot) is None
    for wrong, fault in (
        ([[0, 1, leaves], [0, 1, 2]], "does not have"),
        ([[0, -1, 2], [0, 1, 2]], "does not have"),
        ([[-1, -1, -1], [-1, -1, -1]], "no session"),
    ):
        assert fault in (illegal(Beams(np.array([wrong]), scores), snapshot) or "")


def test_an_illegal_answer_holds_a_candidate_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.gate.illegal", lambda found, snapshot: "answer 1 holds an item twice in one session")
    world.checkpoint(1)
    with world.publisher() as publisher, pytest.raises(HeldBack, match="an item twice"):
        publisher.publish()


def test_sessions_that_neither_version_has_learnt_are_counted(world: World) -> None:
    world.checkpoint(1, sequence=SESSIONS)
    with world.publisher() as publisher:
        publisher.publish()
        add_sessions(world.state, range(SESSIONS, SESSIONS + 5))
        world.checkpoint(2, sequence=SESSIONS + 2)
        scores = publisher.publish().scores
    assert scores is not None
    assert (scores.sessions, scores.unseen) == (16, 3)


def test_a_served_version_that_cannot_be_read_does_not_keep_a_better_one_away(world: World) -> None:
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
    (world.repository / "recommend" / "1" / "graph" / "model.weights").unlink()
    world.checkpoint(2)
    with world.publisher() as publisher:
        scores = publisher.publish().scores
    assert scores is not None and scores.served is None and scores.candidate is not None


def test_the_model_of_a_bundle_is_that_of_its_checkpoint_and_scores_as_it(small_world: World) -> None:
    folder = small_world.repository / "recommend" / "1"
    manifest, snapshot = bundle.read_manifest(folder), bundle.read_catalogue(folder)
    found = bundle_model(folder, manifest.model_config)
    trained = load_model(small_world.checkpoint(1))
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in trained.state_dict().items())
    index = {item_id: row for row, item_id in enumerate(snapshot.item_ids)}
    examples = list(itertools.chain.from_iterable(
        session_examples(session(n), index, len(index), m=3, n=20, fresh=True, counts=Counter()) for n in range(7)
    ))
    assert mean_loss(found, examples, snapshot.item_codes) == mean_loss(trained, examples, snapshot.item_codes)
    one_by_one = [mean_loss(found, [example], snapshot.item_codes) * len(example.targets) for example in examples]
    assert mean_loss(found, examples, snapshot.item_codes) == pytest.approx(
        sum(one_by_one) / sum(len(example.targets) for example in examples), rel=1e-5
    )


def test_the_newest_sessions_read_on_are_those_read_at_once(world: World) -> None:
    with Reader(world.state) as reader:
        read_on = NewestSessions(5)
        assert [sequence for sequence, _ in read_on.read(reader)] == list(range(SESSIONS - 4, SESSIONS + 1))
        for more in (range(SESSIONS, SESSIONS + 2), range(SESSIONS + 2, SESSIONS + 30)):
            add_sessions(world.state, more)
            reader.refresh()
            assert list(read_on.read(reader)) == list(NewestSessions(5).read(reader))
        assert [sequence for sequence, _ in NewestSessions(1000).read(reader)] == list(range(1, SESSIONS + 31))


def test_a_gate_without_a_session_checks_what_it_can(small_world: World, tmp_path: object) -> None:
    folder = small_world.repository / "recommend" / "1"
    manifest, snapshot = bundle.read_manifest(folder), bundle.read_catalogue(folder)

    class Empty:
        def last_sequence(self) -> int:
            return 0

        def sessions(self, after: int = 0) -> list[object]:
            return []

    judged = Gate(GateConfig()).judge(
        Empty(), manifest, folder, snapshot, Graph(folder / "graph", snapshot.trie, threads=1), None  # type: ignore[arg-type]
    )
    assert judged.fault is None
    assert judged.scores.candidate is None and judged.scores.latency_ms is not None
