"""Versions swap under a real Triton without a failed request, whatever kills or spoils the publisher."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from serving_helpers import as_format_1, builder, expected_choice, expected_rewards, expected_session, set_aside

from exporter import bundle
from exporter.client import Client
from exporter.override import rollback
from exporter.publish import load_repository, publish_bundle
from exporter.repository import Repository
from exporter.server import TritonServer
from exporter.triton_config import RecommendConfig
from onerec.errors import Failure, OneRecError, UserError
from trainer.config import RewardConfig

Start = Callable[..., tuple[TritonServer, Client]]


class Asking:
    """A client that asks without pause and checks that each answer is a whole version's own."""

    def __init__(self, url: str) -> None:
        self.versions: list[int] = []
        self.faults: list[str] = []
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with Client(self._url) as client:
            while not self._stop.is_set():
                try:
                    answer = client.recommend(history=["v2"])
                except OneRecError as error:
                    self.faults.append(str(error))
                    continue
                if answer.items[0] != expected_session(answer.model_version, ("v2",)):
                    self.faults.append(f"version {answer.model_version} answered {answer.items[0]}")
                self.versions.append(answer.model_version)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for(self, version: int) -> None:
        """Until that version has answered."""
        deadline = time.monotonic() + 20
        while version not in self.versions[-50:]:
            assert time.monotonic() < deadline, f"version {version} never answered; last {self.versions[-5:]}"
            time.sleep(0.02)


@contextmanager
def serving(repository: Path) -> Iterator[tuple[TritonServer, Client]]:
    with TritonServer(repository) as server, Client(server.url) as client:
        load_repository(repository, client)
        yield server, client


def spoil_graph(folder: Path) -> None:
    (folder / "graph" / "model.cpu.onnx").write_bytes(b"not a graph")


def spoil_sealed(folder: Path) -> None:
    """A graph that no runtime loads, in a bundle whose hashes are right."""
    spoil_graph(folder)
    manifest = bundle.read_manifest(folder)
    import msgspec

    bundle.write_manifest(folder, msgspec.structs.replace(manifest, files=bundle.digest_files(folder)))


def spoil_answer(folder: Path) -> None:
    """A sealed bundle that answers with another version's number."""
    import msgspec

    bundle.write_manifest(folder, msgspec.structs.replace(bundle.read_manifest(folder), version=77))


@pytest.mark.slow
def test_publish_and_rollback_under_load_fail_no_request(repository: Path) -> None:
    with serving(repository) as (server, client), Asking(server.url) as asking:
        for version in (2, 3, 4, 5):
            assert publish_bundle(repository, builder(), server=server.url) == version
            assert client.recommend(history=[]).model_version == version
        assert rollback(repository, reason="bad", server=server.url) == ([5], 4)
        assert client.recommend(history=[]).model_version == 4
        asking.wait_for(4)
        assert publish_bundle(repository, builder(), server=server.url) == 6
        asking.wait_for(6)
    assert asking.faults == []
    assert {1, 6} <= set(asking.versions)


@pytest.mark.slow
def test_a_reward_model_comes_and_goes_with_its_version_under_load(repository: Path) -> None:
    """A client that asks by reward is answered by exactly the versions that can; one by likelihood, by all."""
    as_format_1(repository / "recommend" / "1")
    weights = RewardConfig(swt=1, vtr=0, wtr=0, ltr=3)
    chosen: dict[int, int] = {}

    def choose(url: str, stop: threading.Event) -> None:
        with Client(url) as client:
            while not stop.is_set():
                try:
                    answer = client.recommend(history=["v2"], count=2, select="reward")
                except UserError as error:
                    assert "without a reward model" in str(error)
                    continue
                best = expected_choice(answer.model_version, ("v2",), weights)[:2]
                assert answer.items == [session for session, _, _ in best]
                assert np.allclose(answer.rewards, [rewards for _, rewards, _ in best])
                chosen[answer.model_version] = chosen.get(answer.model_version, 0) + 1

    stop = threading.Event()
    with serving(repository) as (server, client), Asking(server.url) as asking, ThreadPoolExecutor(1) as pool:
        choosing = pool.submit(choose, server.url, stop)
        try:
            assert client.recommend(history=[]).rewards is None
            assert publish_bundle(repository, builder(reward=weights), server=server.url) == 2
            asking.wait_for(2)
            served = client.recommend(history=["v1"], count=2)
            assert np.allclose(served.rewards, [expected_rewards(session, ("v1",)) for session in served.items])
            assert client.recommend(history=["v1"], version=1).rewards is None
            assert publish_bundle(repository, builder(), server=server.url) == 3
            with pytest.raises(UserError, match="without a reward model"):
                client.recommend(history=[], select="reward")
            assert rollback(repository, reason="bad", server=server.url) == ([3], 2)
            assert client.recommend(history=[], select="reward").model_version == 2
            assert rollback(repository, reason="bad", server=server.url) == ([2], 1)
            asking.wait_for(1)
            assert client.recommend(history=[]).rewards is None
            assert publish_bundle(repository, builder(reward=weights), server=server.url) == 4
            deadline = time.monotonic() + 20
            while 4 not in chosen and not choosing.done() and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            stop.set()
        choosing.result()
    assert asking.faults == []
    assert chosen.keys() == {2, 4}


def spoil_rewards(folder: Path) -> None:
    """A sealed bundle whose reward model is another than the one that was checked."""
    import msgspec

    manifest = bundle.read_manifest(folder)
    assert manifest.reward is not None
    part = msgspec.structs.replace(manifest.reward, weights=RewardConfig(swt=0, vtr=0, wtr=1, ltr=0))
    bundle.write_manifest(folder, msgspec.structs.replace(manifest, reward=part))


def spoil_reward_graph(folder: Path) -> None:
    """A reward graph that no runtime loads, in a bundle whose hashes are right."""
    import msgspec

    (folder / "reward" / "model.cpu.onnx").write_bytes(b"not a graph")
    manifest = bundle.read_manifest(folder)
    bundle.write_manifest(folder, msgspec.structs.replace(manifest, files=bundle.digest_files(folder)))


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "reason"), [(spoil_rewards, "by reward where"), (spoil_reward_graph, "cannot be loaded")])
def test_a_version_whose_reward_model_is_bad_is_set_aside(
    repository: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    with serving(repository) as (server, client), Asking(server.url) as asking:
        with pytest.raises(Failure, match=f"(?s)version 2 was set aside .*version 1 serves on.*{reason}"):
            publish_bundle(repository, builder(reward=RewardConfig(ltr=5), spoil=spoil), server=server.url)
        assert reason in set_aside(repository, 2)
        asking.wait_for(1)
    assert asking.faults == []


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "reason"), [
    (spoil_graph, "model.cpu.onnx is not what was published"),
    (spoil_sealed, "cannot be loaded"),
    (spoil_answer, "answers with version 77, not 2"),
])  # fmt: skip
def test_a_bad_version_is_set_aside_and_the_old_one_serves_on(
    repository: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    with serving(repository) as (server, client), Asking(server.url) as asking:
        with pytest.raises(Failure, match=f"(?s)version 2 was set aside .*version 1 serves on.*{reason}"):
            publish_bundle(repository, builder(spoil=spoil), server=server.url)
        assert reason in set_aside(repository, 2)
        assert Repository(repository).versions() == [1]
        asking.wait_for(1)
        assert publish_bundle(repository, builder(), server=server.url) == 3
        asking.wait_for(3)
    if spoil is not spoil_answer:
        assert asking.faults == []
        assert set(asking.versions) == {1, 3}


@pytest.mark.slow
def test_a_start_sets_bad_versions_aside_and_serves_the_rest(repository: Path) -> None:
    publish_bundle(repository, builder())
    publish_bundle(repository, builder(spoil=spoil_sealed))
    spoil_graph(repository / "recommend" / "2")
    with TritonServer(repository) as server, Client(server.url) as client:
        version, refused = load_repository(repository, client)
        assert version == 1
        assert refused.keys() == {2, 3}
        assert client.recommend(history=[]).model_version == 1
    assert Repository(repository).versions() == [1]


def test_nothing_is_published_to_a_server_that_is_down(repository: Path) -> None:
    with pytest.raises(Failure, match="does not answer, so nothing was published"):
        publish_bundle(repository, builder(), server="127.0.0.1:9")
    assert Repository(repository).versions() == [1]
    publish_bundle(repository, builder())
    with pytest.raises(Failure, match="nothing was rolled back"):
        rollback(repository, reason="bad", server="127.0.0.1:9")
    assert Repository(repository).versions() == [1, 2]


@pytest.mark.slow
def test_a_server_that_dies_while_it_loads_is_told_and_the_next_start_is_clean(repository: Path) -> None:
    with TritonServer(repository) as server, Client(server.url) as client:
        load_repository(repository, client)
        (repository / "slow").write_text("")

        def stall(folder: Path) -> None:
            entry = folder / "model.py"
            entry.write_text("import time\ntime.sleep(30)\n" + entry.read_text().replace("from __future__", "# "))

        def kill() -> None:
            time.sleep(1.0)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(Failure, match="(?s)version 2 was set aside.*does not answer"):
            publish_bundle(repository, builder(spoil=stall), server=server.url)
        killer.join()
    assert Repository(repository).versions() == [1]
    with serving(repository) as (_, client):
        assert client.recommend(history=[]).model_version == 1


@pytest.mark.slow
def test_a_server_of_another_repository_is_not_believed(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    publish_bundle(other, builder())
    with serving(other) as (server, client):
        with pytest.raises(Failure, match="version 2 was set aside.*does it serve this repository"):
            publish_bundle(repository, builder(), server=server.url)
        assert Repository(repository).versions() == [1]
        assert client.recommend(history=[]).model_version == 1


@pytest.mark.slow
def test_too_many_requests_are_told_to_come_back(repository: Path) -> None:
    publish_bundle(repository, builder(), config=RecommendConfig(max_queue_size=1, max_batch=1))
    with serving(repository) as (server, client), ThreadPoolExecutor(32) as pool:

        def ask(_: int) -> str:
            try:
                client.recommend(history=["v1"])
            except Failure as error:
                return str(error)
            return "answered"

        told = set(pool.map(ask, range(300)))
    assert "answered" in told
    assert any("overloaded" in text for text in told), told


PUBLISHER = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from serving_helpers import builder
from exporter.publish import publish_bundle
builder()(Path(tempfile.mkdtemp(dir=sys.argv[4])), 1)  # imports and first calls are not what is to be killed
print("begin", flush=True)
while True:
    publish_bundle(Path(sys.argv[1]), builder(), server=sys.argv[2])
"""


@pytest.mark.slow
def test_publishers_killed_at_random_moments_never_show_half_a_version(repository: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    with serving(repository) as (server, client), Asking(server.url) as asking:
        began = time.monotonic()
        publish_bundle(repository, builder(), server=server.url)
        one = time.monotonic() - began
        for _ in range(15):
            here = str(Path(__file__).parent)
            command = [sys.executable, "-c", PUBLISHER, str(repository), server.url, here, str(tmp_path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as publisher:
                assert publisher.stdout is not None
                assert publisher.stdout.readline() == b"begin\n"
                time.sleep(rng.uniform(0, 2 * one))
                publisher.kill()
            for version in Repository(repository).versions():
                assert bundle.verify_bundle(Repository(repository).folder(version)).version == version
        last = publish_bundle(repository, builder(), server=server.url)
        assert client.recommend(history=[]).model_version == last
        asking.wait_for(last)
    assert asking.faults == []
    assert asking.versions == sorted(asking.versions), "an older version answered after a newer one"
    assert not any(Repository(repository).staging.iterdir())
    events = [event.event for event in Repository(repository).events()]
    assert "rejected" not in events
    assert len(events) > 4, "the kills came too early to show anything"
    with serving(repository) as (_, client):
        assert client.recommend(history=[]).model_version == last
