"""The union of all processes' metrics: what is labelled, what is left out, and that a hung part hangs nobody else."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from onerec.errors import UserError
from onerec.monitor.families import FAMILIES
from onerec.monitor.federation import Federation, fetch, labelled, union
from onerec.monitor.metrics import Metrics
from onerec.monitor.of_run import RESTARTS, UP, RunMetrics
from onerec.supervisor import Job, Supervisor

HISTOGRAM = "onerec_age_seconds"


def samples(page: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of an exposition that Prometheus' own parser takes; no family may be there twice."""
    families = list(text_string_to_metric_families(page))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    return {(sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples}


def exposition(process: str, ages_ms: list[int]) -> str:
    """What a process of ours says."""
    from prometheus_client import generate_latest

    metrics = Metrics(process)
    metrics.ages.observe("history", 10_000, [10_000 - age for age in ages_ms])
    metrics.counter("onerec_events_total").inc(len(ages_ms))
    return generate_latest(metrics.registry).decode()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a_total 3", 'a_total{process="p"} 3'),
        ('a{x="1"} 3 1700000000000', 'a{process="p",x="1"} 3 1700000000000'),
        ("a{} 3", 'a{process="p"} 3'),
        ('a{process="q"} 3', 'a{process="q"} 3'),
        ('a{x="1",process="q"} 3', 'a{x="1",process="q"} 3'),
        (r'a{x="},process=\"q"} 3', r'a{process="p",x="},process=\"q"} 3'),
        ('a{subprocess="q"} 3', 'a{process="p",subprocess="q"} 3'),
    ],
)
def test_a_sample_gets_its_process_and_loses_nothing(line: str, expected: str) -> None:
    assert labelled(line, "p") == expected


def test_the_union_holds_every_series_once_and_every_value(tmp_path: Path) -> None:
    ages = {"replay": [50, 700], "stream-1": [80], "train": []}
    pages = {name: exposition(name, found) for name, found in ages.items()}
    triton = '# HELP nv_x of Triton\n# TYPE nv_x counter\nnv_x{model="recommend"} 4\n'
    found = samples(union(pages, [triton]))
    expected = {
        (name, labels | {("process", process)}): value
        for process, page in pages.items() for (name, labels), value in samples(page).items()
    }
    expected |= samples(triton)
    assert found == expected
    assert found[(f"{HISTOGRAM}_count", frozenset({("stage", "history"), ("process", "replay")}))] == 2


@pytest.mark.parametrize("broken", ["x 1\n", "<html>\n", "# TYPE\nx 1\n"])
def test_a_page_that_makes_no_sense_is_left_out_and_the_rest_stays(broken: str) -> None:
    bad = "# HELP y y\n# TYPE y gauge\ny 2\n" + broken.replace("x 1", "{ 1")
    found = samples(union({"bad": bad, "good": exposition("good", [1])}))
    assert {dict(labels)["process"] for _, labels in found} == {"good"}


class Answers:
    """Processes of a run that answer as they are told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages: dict[str, str] = {}

    def here(self, name: str, page: str, pid: int | None = None) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{name}.address").write_text(f"{name}:1 {os.getpid() if pid is None else pid}\n")
        self.pages[f"http://{name}:1/metrics"] = page

    def gone(self, name: str) -> None:
        (self.folder / f"{name}.address").unlink()

    def get(self, url: str) -> str:
        if url not in self.pages:
            raise ConnectionRefusedError
        return self.pages[url]


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    return Answers(tmp_path / "metrics")


@pytest.fixture
def done() -> set[str]:
    return set()


@pytest.fixture
def federation(answers: Answers, done: set[str]) -> Iterator[Federation]:
    with Federation(answers.folder, 0, get=answers.get, done=done.__contains__, triton="http://triton/metrics") as found:
        yield found


def processes(federation: Federation) -> set[str]:
    federation.poll()
    return {dict(labels)["process"] for _, labels in samples(federation.page())}


def test_nobody_there_is_an_empty_page(federation: Federation) -> None:
    assert processes(federation) == set()
    assert federation.page() == ""


def test_a_service_that_is_gone_has_no_figures_and_a_job_that_is_done_keeps_its_last(
    federation: Federation, answers: Answers, done: set[str]
) -> None:
    for name in ("items", "train"):
        answers.here(name, exposition(name, [5]))
    assert processes(federation) == {"items", "train"}
    done.add("items")
    answers.gone("items")
    answers.gone("train")
    assert processes(federation) == {"items"}
    assert processes(federation) == {"items"}


def test_the_address_of_a_process_that_was_killed_is_not_asked(federation: Federation, answers: Answers) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    answers.here("train", exposition("train", [5]), pid=dead.pid)
    assert processes(federation) == set()
    assert federation.silent() == set()


def test_a_part_that_is_there_and_does_not_answer_is_silent(federation: Federation, answers: Answers) -> None:
    answers.here("train", exposition("train", [5]))
    answers.here("replay", exposition("replay", [5]))
    assert processes(federation) == {"train", "replay"}
    answers.pages.pop("http://train:1/metrics")
    assert processes(federation) == {"replay"}
    assert federation.silent() == {"train"}


def test_tritons_own_metrics_come_as_they_are(federation: Federation, answers: Answers) -> None:
    answers.pages["http://triton/metrics"] = "# HELP nv_x x\n# TYPE nv_x gauge\nnv_x 1\n"
    federation.poll()
    assert federation.page() == answers.pages["http://triton/metrics"]


def test_a_process_that_never_ends_its_answer_holds_nobody_up() -> None:
    class Hangs(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(30)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hangs)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(OSError):
            fetch(f"http://127.0.0.1:{server.server_port}/metrics")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("said", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n# TYPE a gauge\na 1\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\na 1\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
    b"who is there?\r\n",
    b"",
])
def test_a_process_killed_in_the_middle_of_its_answer_has_none(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        killed = threading.Thread(target=answer)
        killed.start()
        with pytest.raises(OSError):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}/metrics")
        killed.join(20)


def test_a_port_in_use_is_refused_with_the_option(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--metrics-port"):
        Federation(tmp_path, taken.getsockname()[1])


def test_real_processes_are_served_over_http_and_a_stopped_one_counts_as_down(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom onerec.monitor.metrics import Metrics\n"
        "with Metrics(sys.argv[1], 0, folder=Path(sys.argv[2])) as metrics:\n"
        "    metrics.counter('onerec_events_total').inc(7)\n    time.sleep(60)\n"
    )
    jobs = [Job(name=name, command=(sys.executable, "-c", code, name, str(tmp_path / "metrics"))) for name in ("a", "b")]
    own = RunMetrics()
    federation = Federation(tmp_path / "metrics", 0, own=own.page, done=own.done)
    with Supervisor(jobs, tmp_path / "logs", say=lambda line: None, grace_seconds=5) as supervisor:
        supervisor.step()
        with own.of(supervisor, federation):

            def up(wanted: dict[str, float]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
                deadline = time.monotonic() + 30
                while True:
                    with urllib.request.urlopen(f"http://{federation.address}/metrics", timeout=10) as answer:
                        found = samples(answer.read().decode())
                    now = {name: found.get((UP, frozenset({("process", name)}))) for name in wanted}
                    there = {dict(labels)["process"] for name, labels in found if name == "onerec_events_total"}
                    if now == wanted and there == {name for name, runs in wanted.items() if runs}:
                        return found
                    assert time.monotonic() < deadline, (now, there)
                    time.sleep(0.1)

            found = up({"a": 1.0, "b": 1.0})
            assert found[("onerec_events_total", frozenset({("process", "a")}))] == 7
            assert found[(RESTARTS, frozenset({("process", "a")}))] == 0
            spent = {dict(labels)["process"] for name, labels in found if name == "process_cpu_seconds_total"}
            assert spent == {"a", "b", "run"}
            os.kill(supervisor.pids()["b"], signal.SIGSTOP)
            up({"a": 1.0, "b": 0.0})
            os.kill(supervisor.pids()["b"], signal.SIGCONT)
            up({"a": 1.0, "b": 1.0})
            os.kill(supervisor.pids()["b"], signal.SIGKILL)
            time.sleep(0.2)
            supervisor.step()
            up({"a": 1.0, "b": 0.0})
    with pytest.raises(OSError):
        fetch(f"http://{federation.address}/metrics")


def test_what_run_says_of_its_parts_is_in_the_list_of_all_metrics() -> None:
    assert {UP, RESTARTS} <= set(FAMILIES)
