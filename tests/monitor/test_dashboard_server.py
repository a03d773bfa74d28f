"""The page's server by what it promises: it only shows, to its own host only, and says why where it cannot."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_world import (
    IMG,
    PATH_USER,
    PLAIN_USER,
    RTL_USER,
    SCRIPT_USER,
    FakeTriton,
    hostile_world,
    served,
    sources,
    triton,
)

from onerec.dashboard.page import Page
from onerec.dashboard.server import bind
from onerec.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model() -> FakeTriton:
    return FakeTriton()


@pytest.fixture(scope="module")
def url(world: Path, model: FakeTriton) -> Iterator[str]:
    with triton(model) as address, served(Page(sources(world, address))) as found:
        yield found


def ask(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def told(url: str, path: str) -> Any:
    status, _, body = ask(url, path)
    assert status == 200, body
    return json.loads(body)


def test_all_parts_are_told(url: str) -> None:
    parts = told(url, "/api/snapshot")["parts"]
    assert {name: part["fault"] for name, part in parts.items()} == dict.fromkeys(parts)
    assert parts["stream"]["data"]["counters"]["events"] == 12
    assert parts["training"]["data"]["steps"] == 60 and len(parts["ledger"]["data"]) == 8
    assert parts["replicas"]["data"][0]["data"]["version"] == 1
    assert parts["releases"]["data"]["versions"][0]["reason"].startswith(IMG)
    stages = {stage["name"]: stage for stage in parts["chain"]["data"]["stages"]}
    assert stages["answered"]["age_ms"] is not None
    # No checkpoint, no version: not known, which is not 0.
    assert stages["trained"]["age_ms"] is None and stages["exported"]["watermark_ms"] is None


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_shows(url: str, method: str) -> None:
    for path in ("/", "/api/snapshot", "/static/app.js"):
        status, headers, _ = ask(url, path, method)
        assert status == 405 and headers["allow"] == "GET, HEAD"


def test_looking_changes_no_file(world: Path, url: str) -> None:
    def files() -> dict[str, tuple[int, str]]:
        # RocksDB's own log is written by whoever opens it; a secondary reader has it elsewhere.
        return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
                for path in sorted(world.rglob("*")) if path.is_file()}  # fmt: skip

    before = files()
    for path in ("/", "/api/snapshot", f"/api/user?id={PLAIN_USER}", "/api/users?prefix=p", "/api/users/random"):
        told(url, path) if path != "/" else ask(url, path)
    assert files() == before


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", ""])
def test_a_foreign_host_name_is_refused(url: str, host: str) -> None:
    status, _, body = ask(url, "/api/snapshot", host=host)
    assert status == 421 and b"stream" not in body


def test_every_answer_has_the_security_headers(url: str) -> None:
    for path in ("/", "/static/app.js", "/api/snapshot", "/nothing", "/static/../page.py"):
        _, headers, _ = ask(url, path)
        assert headers["content-security-policy"].startswith("default-src 'self'; object-src 'none'")
        assert headers["x-content-type-options"] == "nosniff" and headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store" and "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", ["../page.py", "%2e%2e/page.py", "..%2f..%2fcli.py", "/etc/passwd", "vendor"])
def test_nothing_but_its_own_files_is_given(url: str, path: str) -> None:
    assert ask(url, f"/static/{path}")[0] == 404


@pytest.mark.parametrize("user", [SCRIPT_USER, RTL_USER, PATH_USER, PLAIN_USER])
def test_a_user_is_named_by_any_id(url: str, model: FakeTriton, user: str) -> None:
    answer = told(url, "/api/user?" + urllib.parse.urlencode({"id": user}))["data"]
    assert answer["user_id"] == user and answer["watched"]["data"]["known"]
    recommended = answer["recommended"]["data"]
    assert recommended["sessions"][0]["items"] == model.items and set(recommended["items"]) == set(model.items)
    assert model.users[-1] == user


@pytest.mark.parametrize("query", ["", "id=", "id=" + "x" * 257, "id=%00" * 2 + "x" * 300])
def test_what_is_no_user_id_is_refused(url: str, query: str) -> None:
    status, _, body = ask(url, f"/api/user?{query}")
    assert status == 400 and json.loads(body)["fault"]


@pytest.mark.parametrize("query", ["id=%00", "id=%ff%fe", "id=%ED%A0%80", "id=a&id=b", "prefix=%ff"])
def test_odd_bytes_do_no_harm(url: str, query: str) -> None:
    for path in ("/api/user", "/api/users"):
        status, _, body = ask(url, f"{path}?{query}")
        assert status in (200, 400) and set(json.loads(body)) == {"data", "fault"}


def test_an_unknown_user_has_no_data_and_still_sessions(url: str) -> None:
    answer = told(url, "/api/user?id=nobody")["data"]
    assert answer["watched"]["data"] == {"known": False, "length": 0, "history": []}
    assert answer["recommended"]["data"]["sessions"]


def test_with_nothing_there_every_part_says_why(tmp_path: Path) -> None:
    with served(Page(sources(tmp_path, "127.0.0.1:1"))) as url:
        parts = told(url, "/api/snapshot")["parts"]
        for name in ("stream", "checkpoint", "releases"):
            assert parts[name]["data"] is None and "there is none" in parts[name]["fault"]
        assert "does not answer" in parts["replicas"]["data"][0]["fault"]
        assert all(stage["age_ms"] is None for stage in parts["chain"]["data"]["stages"])
        for name in ("training", "ledger", "drift", "lag"):
            assert parts[name]["data"] is None and parts[name]["fault"] is None
        answer = told(url, "/api/user?id=x")["data"]
        assert "there is none" in answer["watched"]["fault"] and "does not answer" in answer["recommended"]["fault"]
        assert "there is none" in told(url, "/api/users/random")["fault"]


def test_half_a_state_and_damaged_files_are_said(tmp_path: Path) -> None:
    database = tmp_path / "state" / "db"
    database.mkdir(parents=True)
    (database / "CURRENT").write_text("MANIFEST-000005\n")
    (database / "IDENTITY").write_text("x")
    run = tmp_path / "run"
    (run / "checkpoints" / "000000007").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "freshness.jsonl").write_text("not json\n")
    (run / "drift.json").write_text("{")
    (tmp_path / "repository" / "recommend" / "3").mkdir(parents=True)
    (tmp_path / "repository" / "recommend" / "3" / "manifest.json").write_text("{")
    with served(Page(sources(tmp_path, "127.0.0.1:1"))) as url:
        parts = told(url, "/api/snapshot")["parts"]
        for name in ("stream", "checkpoint", "training"):
            assert parts[name]["data"] is None and parts[name]["fault"], name
        assert parts["releases"]["data"]["unread"] and parts["chain"]["data"]["headline_ms"] is None


def test_what_changes_is_told_while_it_lasts_and_the_rest_is_not_repeated(url: str) -> None:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=20)
    connection.request("GET", "/api/live")
    answer = connection.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    events: list[tuple[str, Any]] = []
    name = ""
    while len(events) < 3:
        field, _, value = answer.readline().decode().strip().partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            events.append((name, json.loads(value)))
    connection.close()
    assert [event for event, _ in events] == ["settings", "parts", "parts"]
    assert {"chain", "stream", "replicas", "training"} <= set(events[1][1])
    assert "chain" in events[2][1] and "training" not in events[2][1]


def test_a_port_in_use_is_a_users_error() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(UserError, match="in use; name another with --port"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_the_command_says_where_it_is_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "onerec.cli", "dashboard", "--state", str(tmp_path / "s"), "--run", str(tmp_path / "r"),
               "--repository", str(tmp_path / "m"), "--server", "127.0.0.1:1", "--port", "0"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        url = line.split()[1].rstrip("/")
        assert ask(url, "/")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0, process.stderr.read()
