"""A real Triton for tests of the serving end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from release_helpers import World, make_state
from serving_helpers import builder

from exporter.client import Client
from exporter.publish import publish_bundle
from exporter.server import TritonServer, find_installation
from onerec.errors import UserError


@pytest.fixture(scope="module")
def start_triton() -> Iterator[Callable[..., tuple[TritonServer, Client]]]:
    """A factory of servers on free ports, each with a client; all stopped at the end of the module."""
    try:
        find_installation()
    except UserError as error:
        pytest.skip(str(error))
    with ExitStack() as stack:

        def start(repository: Path, state: Path | None = None) -> tuple[TritonServer, Client]:
            server = stack.enter_context(TritonServer(repository, state))
            return server, stack.enter_context(Client(server.url))

        yield start


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository that holds version 1 of the hand-made bundle."""
    root = tmp_path / "repository"
    assert publish_bundle(root, builder()) == 1
    return root


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A state and a repository whose graph template is traced; not to be changed."""
    folder = tmp_path_factory.mktemp("small_world")
    make_state(folder / "made")
    world = World(folder, folder / "made")
    world.checkpoint(1)
    with world.publisher() as publisher:
        publisher.publish()
    return world


@pytest.fixture
def world(small_world: World, tmp_path: Path) -> World:
    """A state with sessions and a catalogue, a run without a checkpoint, an empty repository that needs no tracing."""
    return World(tmp_path, small_world.state, small_world.repository / ".onerec" / "templates")


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A path that no one can make a folder of, root included: its parent is a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "repository"


def process_exists(pid: int) -> bool:
    """Whether a process is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
