"""A whole system of real processes on one broker: started, killed, frozen, wiped and waited for; loud when it stands still."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from comparison import Tail, Verdict, fold_progress, judge
from confluent_kafka import ConsumerGroupState, KafkaException
from confluent_kafka.admin import AdminClient
from patience import PATIENCE, TooSlow
from reference_log import SETTINGS, Reference, onerec

from onerec.config import Config, load_config
from streaming.kafka.settings import client
from streaming.kafka.wire import Progress

FROZEN = Path(__file__).with_name("frozen.py")
SESSION_TIMEOUT_MS = 3_000
TAIL_BYTES = 2_500
STANDSTILL = 30.0
"""Seconds without progress after which missing data are not on their way any more (times PATIENCE)."""


class StackError(AssertionError):
    """Something failed or does not come about; the message ends with the last lines of every log."""


class Process:
    """One command of `onerec`, started as often as one likes, its output in one log file.

    `trap` is what tests/kafka/frozen.py does inside: "freeze:commit:3" stops the process by itself at the third "commit".
    """

    def __init__(self, name: str, words: list[str], log: Path, *, state: Path | None = None) -> None:
        self.name = name
        self.state = state
        self.log = log
        self._words = words
        self._popen: subprocess.Popen[bytes] | None = None
        self.exits: list[int] = []
        """Codes with which it ended by itself."""
        self.frozen = False
        self.doomed = False
        """Whether a trap is set that will kill it."""

    @property
    def pid(self) -> int:
        assert self._popen is not None, f"{self.name} was not started"
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether the process is there (frozen ones are)."""
        if self._popen is None:
            return False
        code = self._popen.poll()
        if code is None:
            return True
        self.exits.append(code)
        self._popen = None
        return False

    def start(self, *extra: str, trap: str = "") -> Process:
        """Starts it; `extra` words go behind its own."""
        assert not self.running, f"{self.name} runs already"
        self.doomed = trap.startswith("kill")
        script = [str(FROZEN), trap] if trap else ["-m", "onerec.cli"]
        with self.log.open("ab") as out:
            out.write(f"--- {time.strftime('%H:%M:%S')} start {trap}\n".encode())
            out.flush()
            self._popen = subprocess.Popen(
                [sys.executable, *script, *self._words, *extra], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
            )
        return self

    def kill(self) -> None:
        """SIGKILL; works on frozen ones too."""
        self._end(signal.SIGKILL)

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM; the exit code. Raises TooSlow where it does not end."""
        return self._end(signal.SIGTERM, seconds)

    def _end(self, number: signal.Signals, seconds: float = 10.0) -> int:
        if self._popen is None:
            return 0
        self._popen.send_signal(number)
        try:
            code = self._popen.wait(seconds * PATIENCE)
        except subprocess.TimeoutExpired:
            raise TooSlow(f"{self.name} did not end within {seconds * PATIENCE} s of {number.name}\n{self.tail()}") from None
        finally:
            self.frozen = False
        self._popen = None
        return code

    def freeze(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)
        self.frozen = True

    def wake(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)
        self.frozen = False

    def is_stopped(self) -> bool:
        """Whether it stands still by SIGSTOP, its own or ours."""
        with suppress(FileNotFoundError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        return False

    def result(self, seconds: float) -> bytes:
        """Waits for a clean end; the log since the last start. Raises StackError."""
        assert self._popen is not None
        try:
            code = self._popen.wait(seconds * PATIENCE)
        except subprocess.TimeoutExpired:
            # It may wait for data that were lost: nothing that a second run may hide.
            raise StackError(f"{self.name} did not end within {seconds * PATIENCE} s\n{self.tail()}") from None
        self._popen = None
        if code:
            raise StackError(f"{self.name} ended with {code}\n{self.tail()}")
        return self.log.read_bytes().rpartition(b"--- ")[2]

    def wipe(self) -> None:
        """Its disk is lost. Raises AssertionError while it runs."""
        assert not self.running, f"{self.name} runs"
        assert self.state is not None
        shutil.rmtree(self.state, ignore_errors=True)

    def keep(self, copy: Path) -> None:
        """Copies its disk, as a snapshot of a stopped machine would. Raises AssertionError while it runs."""
        assert not self.running, f"{self.name} runs"
        assert self.state is not None
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.state, copy)

    def put_back(self, copy: Path) -> None:
        """Puts a copy of earlier in the place of its disk."""
        self.wipe()
        assert self.state is not None
        shutil.copytree(copy, self.state)

    def tail(self) -> str:
        """The end of its log, for a message."""
        text = self.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace") if self.log.exists() else ""
        return f"===== {self.name} ({self.log})\n{text}"


class Stack:
    """Ingest, workers, feeders, a replica and producers over one prefix of one broker; ends them all at exit."""

    def __init__(
        self,
        root: Path,
        bootstrap: str,
        *,
        engine: str = "faust",
        prefix: str = "",
        partitions: int = 4,
        semantic: Iterable[str] = SETTINGS,
        kafka: Iterable[str] = (),
    ) -> None:
        self.root = root
        self.engine = engine
        root.mkdir(parents=True, exist_ok=True)
        values = [
            *semantic, f'kafka.bootstrap="{bootstrap}"', f'kafka.prefix="{prefix}"', f"kafka.partitions={partitions}",
            f"kafka.session_timeout_ms={SESSION_TIMEOUT_MS}", *kafka,
        ]
        self.config_file = root / "onerec.toml"
        sections: dict[str, list[str]] = {}
        for value in values:
            section, _, line = value.partition(".")
            sections.setdefault(section, []).append(line)
        self.config_file.write_text(
            "".join(f"[{section}]\n" + "".join(f"{line}\n" for line in found) for section, found in sections.items())
        )
        self.config: Config = load_config(self.config_file)
        self.processes: dict[str, Process] = {}
        self._progress: Tail | None = None
        self._known: dict[int, Progress] = {}
        self.newest: dict[int, int] = {}
        """Partition of the stream → log time of its last commit, ms."""

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """SIGKILL for all that runs."""
        for process in self.processes.values():
            if process.running:
                process.kill()
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def topics(self) -> None:
        onerec("topics", "--create", "--config", self.config_file)

    def process(self, name: str, *words: str | Path, state: bool = False) -> Process:
        """The process of that name, made at first use; with a state folder of its own if it has one."""
        if name not in self.processes:
            folder = self.root / name if state else None
            line = [*map(str, words), *(["--state", str(folder)] if folder else []), "--config", str(self.config_file)]
            self.processes[name] = Process(name, line, self.root / f"{name}.log", state=folder)
        return self.processes[name]

    def ingest(self, number: int = 0) -> Process:
        return self.process(f"ingest{number}", "ingest")

    def worker(self, number: int = 0) -> Process:
        return self.process(f"worker{number}", "stream", "--engine", self.engine, state=True)

    def feeder(self, rank: int = 0, ranks: int = 1) -> Process:
        name = f"feed{rank}" if ranks == 1 else f"feed{rank}of{ranks}"
        return self.process(name, "feed", "--rank", str(rank), "--ranks", str(ranks), state=True)

    def replica(self) -> Process:
        return self.process("replica", "histories-replica", state=True)

    def producer(self, *files: str | Path, name: str = "produce", options: Iterable[str] = ()) -> Process:
        """A producer of files; the same name goes on from where it stopped."""
        return self.process(name, "produce", *files, *options)

    def produce(self, *files: str | Path, options: Iterable[str] = (), seconds: float = 180) -> None:
        """Produces files to the end."""
        number = sum(name.startswith("produce") for name in self.processes)
        self.producer(*files, name=f"produce{number}", options=options).start().result(seconds)

    def tails(self) -> str:
        """The end of every log."""
        return "\n".join(process.tail() for process in self.processes.values())

    def wait(
        self, condition: Callable[[], object], seconds: float, what: str, *,
        data: bool = False, exits: bool = False, every: float = 0.1,
    ) -> float:
        """Seconds until the condition held. Raises StackError or TooSlow after `seconds` times PATIENCE.

        With `data` the wait is for events to be applied: TooSlow only where they were still being applied, as what stands
        still may have lost some. StackError also once a process that we started ended by itself with an error, unless
        `exits` says that somebody else looks after that.
        """
        began = moved = time.monotonic()
        state = self.state()
        while not condition():
            now = time.monotonic()
            if state != (state := self.state()):
                moved = now
            if now - began > seconds * PATIENCE:
                late = StackError if data and now - moved > STANDSTILL * PATIENCE else TooSlow
                raise late(f"{what}: not within {seconds * PATIENCE} s; {self.state()}\n{self.tails()}")
            for process in () if exits else self.processes.values():
                if process.running or not process.exits or not process.exits[-1]:
                    continue
                code = process.exits[-1]
                if not (process.doomed and code == -signal.SIGKILL):
                    raise StackError(f"{what}: {process.name} ended with {code}\n{self.tails()}")
            time.sleep(every)
        return time.monotonic() - began

    def shared(self, group: str, members: int, seconds: float = 60) -> float:
        """Waits until a consumer group's partitions are shared out among so many members; seconds it took."""
        admin = AdminClient(client(self.config.kafka, log_level=0))
        name = self.config.kafka.named(group)

        def settled() -> bool:
            found = admin.describe_consumer_groups([name])[name].result()
            busy = sum(bool(member.assignment and member.assignment.topic_partitions) for member in found.members)
            return found.state == ConsumerGroupState.STABLE and busy == members

        return self.wait(settled, seconds, f"{members} members in group {group}")

    def state(self) -> str:
        """One line on where the stream stands."""
        return ", ".join(
            f"{part}: offset {found.offset}, {found.sessions} sessions{', ended' if found.ended else ''}"
            for part, found in sorted(self._known.items())
        ) or "no progress"

    def progress(self) -> dict[int, Progress]:
        """What every partition of the stream has come to; as far as the broker can be asked, else as known before."""
        with suppress(KafkaException):
            if self._progress is None:
                self._progress = Tail(self.config.kafka, "progress")
            found = self._progress.ready()
            fold_progress(self._known, found)
            for message in found:
                key = message.key() or b""
                if key.startswith(b"partition:"):
                    self.newest[int(key[10:])] = message.timestamp()[1]
        return self._known

    def state_of(self, partition: int) -> int:
        """The offset of `events` that a partition has come to; 0 where nothing is known."""
        return self._known[partition].offset if partition in self._known else 0

    def events(self) -> int:
        """Valid events applied so far."""
        return sum(found.counters.events for found in self.progress().values())

    def ended(self) -> bool:
        """Whether every partition of the stream has passed an end marker."""
        found = self.progress()
        return len(found) == self.config.kafka.partitions and all(part.ended for part in found.values())

    def finish(self, seconds: float = 120) -> float:
        """Waits until the stream has passed the end markers everywhere; seconds it took."""
        return self.wait(self.ended, seconds, "the end of the log", data=True)

    def drain(self, *readers: Process, seconds: float = 120) -> None:
        """Stops feeders and replicas, and runs each once more to the end of its topic."""
        for reader in readers:
            if reader.running:
                assert reader.stop() == 0, f"{reader.name} did not stop cleanly\n{reader.tail()}"
            reader.start("--until-end").result(seconds)

    def judge(self, wanted: Reference, *, feeds: Iterable[Process] = (), replica: Process | None = None) -> Verdict:
        """All that is there against the reference."""
        states = [feed.state for feed in feeds if feed.state]
        return judge(
            self.config.kafka, self.config.history.length, wanted, feeds=states, replica=replica.state if replica else None
        )
