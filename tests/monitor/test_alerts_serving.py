"""A real Prometheus over two real Tritons: different versions, a rollback, and one that is killed; each alert clears again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_helpers import Program, Prometheus, free_port, onerec

from exporter.publish import publish_bundle
from exporter.server import find_installation
from onerec.errors import UserError

# The hand-made bundles of the exporter's tests: a version without training.
sys.path.append(str(Path(__file__).parents[1] / "exporter"))
from serving_helpers import builder  # noqa: E402


class System:
    """Replicas `new`, with version 2, and `old`, a copy that stayed at version 1; a monitor that asks both."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.repository = folder / "new"
        assert publish_bundle(self.repository, builder()) == 1
        shutil.copytree(self.repository, folder / "old")
        assert publish_bundle(self.repository, builder()) == 2
        self.ports = {name: str(free_port()) for name in ("new", "old")}
        self.servers = {name: self.start(name) for name in self.ports}
        looking = str(free_port())
        asked = [word for port in self.ports.values() for word in ("--server", f"127.0.0.1:{port}")]
        stack.enter_context(onerec(
            folder, "monitor", "monitor", "--state", folder / "state", "--run", folder / "run", "--repository",
            self.repository, *asked, "--metrics-port", looking, "--set", "monitor.every_s=0.3",
        ))
        self.prometheus = stack.enter_context(Prometheus(folder / "prometheus", {"monitor": f"127.0.0.1:{looking}"}))

    def start(self, name: str) -> Program:
        """A Triton on the folder of that name."""
        return self._stack.enter_context(onerec(
            self._folder, name, "serve", "--repository", self._folder / name, "--http-port", "0", "--grpc-port",
            self.ports[name], "--metrics-port", "0",
        ))

    def on_new(self, command: str) -> None:
        """`onerec rollback` or `promote` of the replica `new`."""
        words = ["--repository", self.repository, "--server", f"127.0.0.1:{self.ports['new']}", "--reason", "a test"]
        subprocess.run([sys.executable, "-m", "onerec.cli", command, *map(str, words)], check=True, timeout=60)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    try:
        find_installation()
    except UserError as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        found = System(tmp_path_factory.mktemp("serving"), stack)
        found.prometheus.wait_for_value("sum(onerec_replica_up)", 2)
        yield found


@pytest.mark.slow
def test_versions_are_mixed_until_one_is_rolled_back_which_puts_publishing_on_hold(system: System) -> None:
    prometheus = system.prometheus
    assert prometheus.wait_for("OneRecMixedVersions") == "replicas answer with versions that are 1 apart"
    assert "OneRecPublishingOnHold" not in prometheus.firing()
    system.on_new("rollback")
    prometheus.wait_for("OneRecPublishingOnHold")
    prometheus.wait_for_end("OneRecMixedVersions")
    system.on_new("promote")
    prometheus.wait_for_end("OneRecPublishingOnHold")


@pytest.mark.slow
def test_a_replica_that_is_killed_is_down_until_it_is_back(system: System) -> None:
    prometheus = system.prometheus
    prometheus.wait_for_end("OneRecReplicaDown")
    system.servers["old"].send(signal.SIGKILL)
    assert prometheus.wait_for("OneRecReplicaDown") == f"1 replica down: 127.0.0.1:{system.ports['old']} does not answer"
    system.start("old")
    prometheus.wait_for_end("OneRecReplicaDown")
