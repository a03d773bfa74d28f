"""The supervisor: real child processes, restarted, ended, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from onerec.errors import UserError
from onerec.supervisor import Job, Supervisor

SLEEPER = (sys.executable, "-c", "import time; time.sleep(60)")


def fails(status: int) -> tuple[str, ...]:
    """A command that ends with a status at once."""
    return (sys.executable, "-c", f"print('the reason'); raise SystemExit({status})")


def until(condition: Callable[[], bool], step: Callable[[], None] = lambda: None, seconds: float = 20.0) -> None:
    """Step until the condition holds; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        step()
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_service_is_restarted_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    with Supervisor([Job(name="nap", command=SLEEPER)], tmp_path, say=said.append) as supervisor:
        supervisor.step()
        first = supervisor.pids()["nap"]
        os.kill(first, signal.SIGKILL)
        until(lambda: supervisor.pids().get("nap", first) != first, supervisor.step)
    assert any("SIGKILL" in line and "again in 1 s" in line for line in said)


def test_backoff_doubles(tmp_path: Path) -> None:
    said: list[str] = []
    now = [0.0]
    job = Job(name="bad", command=fails(1))
    with Supervisor([job], tmp_path, say=said.append, clock=lambda: now[0]) as supervisor:

        def advance() -> None:
            now[0] += 0.25
            supervisor.step()

        until(lambda: sum("again in" in line for line in said) >= 4, advance)
    waits = [line.partition("again in ")[2].split()[0] for line in said if "again in" in line]
    assert waits[:4] == ["1", "2", "4", "8"]


def test_once_is_done_when_it_succeeds(tmp_path: Path) -> None:
    with Supervisor([Job(name="ok", command=fails(0), kind="once")], tmp_path, say=print) as supervisor:
        until(lambda: supervisor.done("ok"), supervisor.step)
        supervisor.step()
        assert supervisor.pids() == {}


def test_a_wrong_request_stops_the_run_with_its_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="the reason"),
        Supervisor([Job(name="wrong", command=fails(2))], tmp_path, say=print) as supervisor,
    ):
        until(lambda: False, supervisor.step)


def test_what_runs_and_how_often_it_was_started_again_is_told(tmp_path: Path) -> None:
    jobs = [Job(name="nap", command=SLEEPER), Job(name="ok", command=fails(0), kind="once"),
            Job(name="later", command=SLEEPER, ready=lambda: False)]
    now = [0.0]
    with Supervisor(jobs, tmp_path, say=print, clock=lambda: now[0]) as supervisor:
        assert supervisor.up() == supervisor.restarts() == {}
        until(lambda: supervisor.done("ok"), supervisor.step)
        assert supervisor.up() == {"nap": True}
        os.kill(supervisor.pids()["nap"], signal.SIGKILL)
        until(lambda: supervisor.up() == {"nap": False}, supervisor.step)
        now[0] += 100
        until(lambda: supervisor.up() == {"nap": True}, supervisor.step)
        assert supervisor.restarts() == {"nap": 1, "ok": 0}


def test_a_job_gives_way_as_much_as_it_should(tmp_path: Path) -> None:
    code = (
        "import os, pathlib\nprint(os.nice(0))\n"
        "group = pathlib.Path('/proc/self/autogroup')\nprint(group.read_text() if group.exists() else 'nice 3')"
    )
    job = Job(name="low", command=(sys.executable, "-c", code), kind="once", nice=3)
    with Supervisor([job], tmp_path, say=print) as supervisor:
        until(lambda: supervisor.done("low"), supervisor.step)
        log = supervisor.log_path("low").read_text()
    niceness, group = [line for line in log.splitlines() if line.strip()][-2:]
    assert int(niceness) == min(19, os.nice(0) + 3)
    assert group.endswith("nice 3")


def test_a_job_waits_until_it_is_ready(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with Supervisor([Job(name="late", command=SLEEPER, ready=gate.exists)], tmp_path, say=print) as supervisor:
        supervisor.step()
        assert supervisor.pids() == {}
        gate.touch()
        supervisor.step()
        assert "late" in supervisor.pids()


def test_stop_leaves_no_process_not_even_a_stubborn_grandchild(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}.')\n"
        "time.sleep(60)\n"
    )
    said: list[str] = []
    job = Job(name="stubborn", command=(sys.executable, "-c", code))
    with Supervisor([job], tmp_path, say=said.append, grace_seconds=0.3) as supervisor:
        supervisor.step()
        until(lambda: pids.exists() and pids.read_text().endswith("."))
    parent, child = map(int, pids.read_text().rstrip(".").split())
    until(lambda: not alive(parent) and not alive(child), seconds=5)
    assert any("was killed" in line for line in said)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_killed_supervisor_takes_its_children_along(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom onerec.supervisor import Job, Supervisor\n"
        "job = Job(name='nap', command=(sys.executable, '-c', 'import time; time.sleep(60)'))\n"
        f"with Supervisor([job], Path({str(tmp_path)!r}), say=print) as s:\n"
        "    s.step(); print(s.pids()['nap'], flush=True); time.sleep(60)\n"
    )
    outer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert outer.stdout is not None
        lines = [outer.stdout.readline() for _ in range(2)]
        inner = int(next(line for line in lines if line.strip().isdigit()))
        assert alive(inner)
        outer.kill()
        until(lambda: not alive(inner), seconds=5)
    finally:
        outer.kill()
        outer.wait()


def test_logs_that_cannot_be_written_are_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--run"), Supervisor([], tmp_path / "file" / "logs", say=print):
        pass


def test_what_outlives_the_others_is_stopped_after_them(tmp_path: Path) -> None:
    note = tmp_path / "note"
    waits = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(0))\nprint('up', flush=True)\ntime.sleep(60)"
    # The client ends half a second after it was told to; the server says whether the client's word is there by then.
    word = f"pathlib.Path({str(note)!r})"
    client = f"import atexit, pathlib\natexit.register(lambda: (time.sleep(0.5), {word}.write_text('done')))\n"
    server = f"import atexit, pathlib\natexit.register(lambda: print('saw', {word}.exists()))\n"
    jobs = [
        Job(name="server", command=(sys.executable, "-c", server + waits), outlives=True),
        Job(name="client", command=(sys.executable, "-c", client + waits)),
    ]
    with Supervisor(jobs, tmp_path / "logs", say=lambda line: None) as supervisor:
        supervisor.step()
        until(lambda: all(supervisor.log_path(name).read_text().endswith("up\n") for name in ("server", "client")))
    assert supervisor.log_path("server").read_text().endswith("saw True\n")
