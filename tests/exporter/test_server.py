"""A real Triton: it answers as the contract says, and leaves nothing behind however it ends."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from conftest import process_exists
from serving_helpers import MODEL, builder, expected_session
from typer.testing import CliRunner

from exporter.client import Client
from exporter.publish import load_repository, publish_bundle
from exporter.server import Ports, TritonServer, find_installation
from onerec.cli import build
from onerec.errors import Failure, UserError

Start = Callable[..., tuple[TritonServer, Client]]
T0 = 1_700_000_000_000


def replay(state: Path, folder: Path, events: list[tuple[str, str, int]], name: str) -> None:
    """Put likes of (user, item, seconds) into a state."""
    lines = [
        orjson.dumps({"type": "like", "user_id": user, "item_id": item, "ts": T0 + second * 1000})
        for user, item, second in events
    ]
    path = folder / name
    path.write_bytes(b"\n".join(lines) + b"\n")
    result = CliRunner().invoke(build(), ["replay", str(path), "--state", str(state), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, start_triton: Start) -> tuple[TritonServer, Client, Path]:
    """A server with version 1 and a state in which u1 liked v1, then v2."""
    folder = tmp_path_factory.mktemp("served")
    replay(folder / "state", folder, [("u1", "v1", 1), ("u1", "v2", 2)], "first.jsonl")
    publish_bundle(folder / "repository", builder())
    server, client = start_triton(folder / "repository", folder / "state")
    assert load_repository(folder / "repository", client) == (1, {})
    return server, client, folder


def test_it_answers_as_the_bundle_does(served: tuple[TritonServer, Client, Path]) -> None:
    _, client, _ = served
    answer = client.recommend(history=["v1", "v5"], count=3)
    assert answer.items == [expected_session(1, ("v1", "v5"), beam) for beam in range(3)]
    assert answer.scores == [-1.0, -2.0, -3.0]
    assert (answer.rewards, answer.model_version, answer.watermark) == (None, 1, 1_000)


def test_stored_histories_are_found_and_followed_while_they_grow(served: tuple[TritonServer, Client, Path]) -> None:
    _, client, folder = served
    assert client.recommend("u1").items[0] == expected_session(1, ("v1", "v2"))
    assert client.recommend("nobody").items[0] == expected_session(1)
    replay(folder / "state", folder, [("u1", "v7", 3), ("new", "v3", 4)], "second.jsonl")
    time.sleep(0.2)
    assert client.recommend("u1").items[0] == expected_session(1, ("v1", "v2", "v7"))
    assert client.recommend("new").items[0] == expected_session(1, ("v3",))


@pytest.mark.parametrize(("request_", "fault"), [
    ({"user_id": ""}, "user_id.*empty"),
    ({"history": ["v1", ""]}, "history.*empty"),
    ({"user_id": "u1", "count": 0}, "count = 0"),
    ({"user_id": "u1", "count": 6}, "from 1 to 5"),
    ({"user_id": "u1", "select": "reward"}, "reward model"),
    ({"user_id": "u1", "select": "?"}, "likelihood"),
    ({}, "neither"),
])  # fmt: skip
def test_a_wrong_request_is_refused_with_words(
    served: tuple[TritonServer, Client, Path], request_: dict, fault: str
) -> None:
    with pytest.raises(UserError, match=fault):
        served[1].recommend(**request_)


def test_many_clients_with_ragged_histories_get_their_own_answers(served: tuple[TritonServer, Client, Path]) -> None:
    _, client, _ = served

    def ask(number: int) -> bool:
        history = tuple(f"v{place}" for place in range(number % 6))
        count = 1 + number % 5
        if number % 7 == 3:
            with pytest.raises(UserError, match="count = 77"):
                client.recommend(history=history, count=77)
            return True
        return client.recommend(history=history, count=count).items == [
            expected_session(1, history, beam) for beam in range(count)
        ]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(120)))


def test_requests_that_wait_together_run_together(served: tuple[TritonServer, Client, Path]) -> None:
    server, client, _ = served

    def executions() -> tuple[int, int]:
        statistics = client._client.get_inference_statistics("recommend", "1").model_stats[0]
        return statistics.inference_count, statistics.execution_count

    before = executions()
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda n: client.recommend(history=["v1"] * (n % 5)), range(200)))
    requests, runs = (after - b for after, b in zip(executions(), before, strict=True))
    assert requests == 200
    assert runs < 150, "requests of different shapes were never batched"


def test_one_request_may_carry_several_rows(served: tuple[TritonServer, Client, Path]) -> None:
    server, _, _ = served
    with grpcclient.InferenceServerClient(server.url) as raw:
        history = grpcclient.InferInput("history", [2, 2], "BYTES")
        history.set_data_from_numpy(np.array([[b"v1", b"v2"], [b"v9", b"v9"]], dtype=object))
        count = grpcclient.InferInput("count", [2, 1], "INT32")
        count.set_data_from_numpy(np.array([[2], [2]], dtype=np.int32))
        result = raw.infer("recommend", [history, count])
    items = [[[item.decode() for item in s] for s in row] for row in result.as_numpy("items")]
    assert items == [
        [expected_session(1, h, beam) for beam in range(2)] for h in (("v1", "v2"), ("v9", "v9"))
    ]
    assert result.as_numpy("rewards").shape == (2, 2, 4) and np.isnan(result.as_numpy("rewards")).all()
    assert result.as_numpy("model_version").tolist() == [[1], [1]]
    assert result.as_numpy("watermark").shape == (2, 1)


def test_http_gives_the_same(served: tuple[TritonServer, Client, Path]) -> None:
    server, client, _ = served
    with httpclient.InferenceServerClient(server.http_url) as raw:
        user = httpclient.InferInput("user_id", [1, 1], "BYTES")
        user.set_data_from_numpy(np.array([[b"u1"]], dtype=object))
        result = raw.infer("recommend", [user])
    assert [item.decode() for item in result.as_numpy("items")[0, 0]] == client.recommend("u1").items[0]


def test_json_over_http_is_json_to_every_reader_when_the_outputs_are_named(
    served: tuple[TritonServer, Client, Path],
) -> None:
    server, client, _ = served
    body = {
        "inputs": [{"name": "history", "datatype": "BYTES", "shape": [1, 2], "data": ["v1", "v2"]},
                   {"name": "count", "datatype": "INT32", "shape": [1, 1], "data": [2]}],
        "outputs": [{"name": "items"}, {"name": "scores"}, {"name": "model_version"}, {"name": "watermark"}],
    }  # fmt: skip
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/recommend/infer", orjson.dumps(body))
    with urllib.request.urlopen(request) as answer:
        outputs = {output["name"]: output for output in orjson.loads(answer.read())["outputs"]}
    assert outputs["items"]["shape"] == [1, 2, MODEL.session_items]
    assert outputs["items"]["data"] == sum(client.recommend(history=["v1", "v2"], count=2).items, [])
    assert outputs["watermark"]["data"] == [1_000]


def test_unknown_items_and_refusals_are_counted_for_prometheus(served: tuple[TritonServer, Client, Path]) -> None:
    server, client, _ = served

    def metric(name: str) -> float:
        with urllib.request.urlopen(server.metrics_url) as page:
            lines = page.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith(f'{name}{{version="1"}}')).split()[-1])

    names = ("onerec_unknown_history_items_total", "onerec_unknown_users_total", "onerec_refused_requests_total")
    before = [metric(name) for name in names]
    client.recommend(history=["?", "v1", "??"])
    client.recommend("stranger")
    with pytest.raises(UserError):
        client.recommend("u1", count=0)
    assert [metric(name) - b for name, b in zip(names, before, strict=True)] == [2, 1, 1]
    assert metric("onerec_bundle_watermark_ms") == 1_000


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("end", ["leave", "error", "SIGKILL"])
def test_nothing_is_left_behind(
    repository: Path, tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = tmp_path / "temporary"
    folders.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    pids: list[int] = []
    try:
        with TritonServer(repository) as server, Client(server.url) as client:
            load_repository(repository, client)
            assert server.pid is not None
            pids = [server.pid, *children(server.pid)]
            assert len(pids) > 1, "the Python backend runs in a process of its own"
            [own] = [entry.name for entry in folders.iterdir() if entry.name.startswith("onerec-triton-")]
            assert list(Path("/dev/shm").glob(f"{own}*"))
            if end == "SIGKILL":
                os.kill(server.pid, signal.SIGKILL)
            elif end == "error":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    deadline = time.monotonic() + 5
    while any(map(process_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(process_exists, pids))
    assert not list(Path("/dev/shm").glob(f"{own}*"))
    assert not [entry.name for entry in folders.iterdir() if entry.name.startswith("onerec-triton-")]


def test_a_taken_port_is_named(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*--grpc-port"), \
                TritonServer(repository, ports=Ports(http=0, grpc=port, metrics=0)):
            pass


def test_a_server_that_cannot_be_run_is_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a program"):
        find_installation(tmp_path / "no-such-server")
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho it broke\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match="no Python backend"):
        find_installation(program)
    (tmp_path / "backends" / "python").mkdir(parents=True)
    with pytest.raises(Failure, match=r"(?s)status 3.*it broke"), TritonServer(repository, binary=program):
        pass


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "localhost", "127.0.0.1:", ":8001", "a:b"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="host:port"):
        Client(url)


def test_a_server_that_is_down_is_told_with_the_remedy() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{free.getsockname()[1]}"
    with Client(url) as client:
        assert not client.alive()
        with pytest.raises(Failure, match=f"{url} does not answer.*onerec serve"):
            client.recommend("u1")


def test_a_server_without_a_version_says_publish(start_triton: Start, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _, client = start_triton(tmp_path / "empty")
    assert load_repository(tmp_path / "empty", client) == (None, {})
    with pytest.raises(Failure, match="onerec publish"):
        client.recommend(history=["v1"])


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 1)])
def test_serve_runs_until_it_is_stopped_and_tells_when_triton_dies(
    repository: Path, end: signal.Signals, status: int
) -> None:
    command = [sys.executable, "-m", "onerec.cli", "serve", "--repository", str(repository), "--json"]
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        ready = orjson.loads(process.stdout.readline())
        assert ready["version"] == 1
        with Client(ready["grpc"]) as client:
            assert client.recommend(history=[]).model_version == 1
        # SIGKILL goes to Triton itself, the others to the command.
        os.kill(ready["pid"] if end == signal.SIGKILL else process.pid, end)
        assert process.wait(30) == status
        if status:
            assert b"Triton ended by itself" in process.stderr.read()
    deadline = time.monotonic() + 5
    while process_exists(ready["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process_exists(ready["pid"])


@pytest.mark.slow
def test_a_killed_serve_takes_its_triton_along_and_the_next_one_sweeps(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = tmp_path / "temporary"
    folders.mkdir()
    monkeypatch.setenv("TMPDIR", str(folders))
    monkeypatch.setattr(tempfile, "tempdir", None)
    command = [sys.executable, "-m", "onerec.cli", "serve", "--repository", str(repository), "--json"]
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        ready = orjson.loads(process.stdout.readline())
        pids = [ready["pid"], *children(ready["pid"])]
        process.kill()
    deadline = time.monotonic() + 15
    while any(map(process_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(process_exists, pids))
    [left] = folders.glob("onerec-triton-*")
    with TritonServer(repository), TritonServer(repository):
        assert not left.exists()
        assert len(list(folders.glob("onerec-triton-*"))) == 2, "a live server's folder is not swept"
    assert not list(folders.glob("onerec-triton-*"))
    assert not list(Path("/dev/shm").glob(f"{left.name}*"))


def test_serve_refuses_folders_that_cannot_be(tmp_path: Path, unwritable: Path) -> None:
    for arguments, fault in (
        (["--repository", str(unwritable)], "cannot be made"),
        (["--repository", str(tmp_path / "r"), "--state", str(tmp_path / "none")], "no such folder"),
    ):
        with pytest.raises(UserError, match=fault):
            CliRunner().invoke(build(), ["serve", *arguments], catch_exceptions=False)


def test_the_hand_made_world_fits_the_model() -> None:
    assert MODEL.session_items == len(expected_session(0))
