"""Child processes kept alive: started when their time has come, restarted with backoff, ended, none left behind."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from onerec.errors import Failure, UserError

FIRST_BACKOFF = 1.0
LONGEST_BACKOFF = 60.0
SOUND_SECONDS = 60.0
"""A child that lived this long starts the next backoff from the beginning."""
GRACE_SECONDS = 25.0
_PR_SET_PDEATHSIG = 1


def _always() -> bool:
    return True


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One command to keep going.

    `once` is restarted until it succeeds, `service` whenever it ends. None starts before `ready()` says so. Exit status 2 means
    that the request itself is wrong, which no restart mends: it ends the whole run unless `retry_user_errors`. One that
    `outlives` the others is stopped after them. `nice`: by how much it gives way to the others.
    """

    name: str
    command: tuple[str, ...]
    kind: Literal["once", "service"] = "service"
    ready: Callable[[], bool] = _always
    retry_user_errors: bool = False
    outlives: bool = False
    nice: int = 0


class _Child:
    """A job's process and what is known of its past."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.not_before = 0.0
        self.backoff = FIRST_BACKOFF
        self.runs = 0
        self.done = False


def _prepare(nice: int) -> None:
    """In the child: a supervisor that was killed takes its children along; and the child's priority.

    Where Linux groups processes by session, niceness counts within a session only, and what counts is that of the group.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if nice:
        os.nice(nice)
        try:
            Path("/proc/self/autogroup").write_text(str(nice))
        except OSError:
            pass


class Supervisor:
    """Runs jobs until told to stop; every child leads its own process group and writes to `logs/NAME.log`.

    Use as a context manager: leaving it stops the children, whatever happened. `say` gets one line for each thing
    worth knowing; `clock` is monotonic seconds.
    """

    def __init__(self, jobs: Sequence[Job], logs: Path, *, say: Callable[[str], None],
                 clock: Callable[[], float] = time.monotonic, grace_seconds: float = GRACE_SECONDS) -> None:
        self._children = [_Child(job) for job in jobs]
        self._logs = logs
        self._say = say
        self._clock = clock
        self._grace = grace_seconds

    def __enter__(self) -> Supervisor:
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"logs {self._logs}: {error.strerror}; give --run a folder that can be written") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def pids(self) -> dict[str, int]:
        """Process ids of the children that run now, by name."""
        return {child.job.name: child.process.pid for child in self._children if child.process is not None}

    def up(self) -> dict[str, bool]:
        """Whether each child runs, for those that have been started and are not done."""
        return {
            child.job.name: child.process is not None for child in self._children if child.runs and not child.done
        }

    def restarts(self) -> dict[str, int]:
        """How often each child that was started has been started again."""
        return {child.job.name: child.runs - 1 for child in self._children if child.runs}

    def done(self, name: str) -> bool:
        """Whether a `once` job has succeeded."""
        return any(child.done for child in self._children if child.job.name == name)

    def step(self) -> None:
        """Look at every child once: reap, restart, start.

        Raises UserError when a child says that its request was wrong, with the end of its log.
        """
        for child in self._children:
            if child.process is not None and (status := child.process.poll()) is not None:
                self._reap(child, status)
            if child.process is None and not child.done and self._clock() >= child.not_before and child.job.ready():
                self._start(child)

    def log_path(self, name: str) -> Path:
        """Where a child's output goes."""
        return self._logs / f"{name}.log"

    def _start(self, child: _Child) -> None:
        job = child.job
        try:
            with self.log_path(job.name).open("ab") as log:
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(job.command)}\n".encode())
                log.flush()
                child.process = subprocess.Popen(  # noqa: S603
                    job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    preexec_fn=functools.partial(_prepare, job.nice) if sys.platform == "linux" else None,
                )
        except OSError as error:
            raise Failure(f"{job.name} cannot be started: {error.strerror} ({error.filename})") from None
        child.started_at = self._clock()
        child.runs += 1
        self._say(f"{job.name} started (pid {child.process.pid})")

    def _reap(self, child: _Child, status: int) -> None:
        job = child.job
        self._end_group(child)
        child.process = None
        now = self._clock()
        if status == 0 and job.kind == "once":
            child.done = True
            self._say(f"{job.name} is done")
            return
        if status == 2 and not job.retry_user_errors:
            raise UserError(f"{job.name} refused its request:\n{self._tail(job.name)}")
        if now - child.started_at >= SOUND_SECONDS:
            child.backoff = FIRST_BACKOFF
        wait, child.not_before = child.backoff, now + child.backoff
        child.backoff = min(2 * child.backoff, LONGEST_BACKOFF)
        ended = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self._say(f"{job.name} {ended}; again in {wait:.0f} s; see {self.log_path(job.name)}")

    def _tail(self, name: str, lines: int = 5) -> str:
        try:
            return "\n".join(self.log_path(name).read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    @staticmethod
    def _end_group(child: _Child) -> None:
        """Kill what is left of a child's process group."""
        if child.process is not None:
            try:
                os.killpg(child.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass

    def stop(self) -> None:
        """End the children: SIGTERM to all, then SIGKILL to the groups of those still there after the grace time."""
        running = [child for child in self._children if child.process is not None]
        self._end([child for child in running if not child.job.outlives])
        self._end([child for child in running if child.job.outlives])

    def _end(self, running: list[_Child]) -> None:
        for child in running:
            if child.process is not None and child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._grace
        for child in running:
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._say(f"{child.job.name} did not end within {self._grace:.0f} s and was killed")
            self._end_group(child)
            child.process.wait()
            child.process = None
