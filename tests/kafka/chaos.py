"""Faults at random moments, by seed, against a whole system under load; and how long the system needed after each."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from confluent_kafka import IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from reference_log import Reference, Shape, lines, reference, settings, write
from stack import Process, Stack

from onerec.errors import OneRecError
from streaming.kafka.broker import Broker
from streaming.kafka.settings import client
from streaming.store import Reader

STORE_STEPS = ("open:fence", "open:catch-up", "begin", "produce", "commit", "write", "close")
INGEST_STEPS = ("open:fence", "open:read", "begin", "produce", "offsets", "commit", "done:commit_transaction")

SHARES = {
    "worker": 20, "worker, disk wiped": 14, "worker, disk of earlier": 8, "worker inside a step": 16,
    "ingest": 16, "ingest inside a step": 8, "feeder": 8, "feeder, disk wiped": 3, "replica": 8, "replica, disk wiped": 3,
    "producer": 8, "broker": 3,
}
WITH_TRAINER = {**SHARES, "trainer": 6}
PENDING = 3
"""Faults that the system may still be recovering from when the next one comes."""
RECOVERY = 180.0
"""Seconds after which a recovery counts as failed."""
TRAIN = ("train.preset=tiny", "train.score_share=0", "train.checkpoint_seconds=5", "train.threads=1")
"""Kind of kill → its share of all, in some unit."""


def deck(kills: int, rng: random.Random, shares: dict[str, int] | None = None) -> list[str]:
    """Kinds of kill, as many as asked, in random order; each kind at least once where there is room."""
    wanted = shares or SHARES
    total = sum(wanted.values())
    found = [kind for kind, share in wanted.items() for _ in range(max(1, kills * share // total))]
    names = list(wanted)
    while len(found) < kills:
        found.append(rng.choices(names, list(wanted.values()))[0])
    found = found[:kills]
    rng.shuffle(found)
    # The trainer begins to learn once there is something to learn from.
    late = [kind for kind in found if kind == "trainer"]
    rest = [kind for kind in found if kind != "trainer"]
    for kind in late:
        rest.insert(rng.randrange(len(rest) // 2, len(rest) + 1), kind)
    return rest


@dataclass
class Fault:
    """One fault, and when the system had recovered from it."""

    kind: str
    at: float
    """Wall clock, s."""
    done: Callable[[Fault], float | None]
    """Wall clock when everything was going on again; None: not yet."""
    alone: bool = True
    """Whether no other fault fell into its recovery."""
    seconds: float | None = None
    seen: dict[int, float] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)


class Chaos:
    """A stack under a log that is produced at a pace, and faults into it."""

    def __init__(
        self, stack: Stack, broker: Broker, log: Path, *, seed: int, workers: int = 3, ingests: int = 2, trains: bool = False
    ) -> None:
        self.stack = stack
        self.broker = broker
        self.rng = random.Random(seed)
        self.workers = [stack.worker(number) for number in range(workers)]
        self.ingests = [stack.ingest(number) for number in range(ingests)]
        self.feed = stack.feeder()
        self.replica = stack.replica()
        self.producer = stack.process("produce", "produce", log, "--end")
        self.school = School(stack) if trains else None
        self.faults: list[Fault] = []
        self.freezes = 0
        self.inside = 0
        """Processes that a trap killed inside a step; not among `faults`."""
        self.stops = 0
        self.exits: dict[str, int] = {}
        """Role → how often a process ended with an error of its own and was started again."""
        self.error_lines: list[str] = []
        self._due: dict[str, tuple[float, str]] = {}
        self._waking: list[tuple[float, Process]] = []
        self._produced = False
        self._watched = 0.0
        self._known_offsets: dict[int, int] = {}
        self._admin = AdminClient({**client(stack.config.kafka), "log_level": 0})
        self._mending: Future[None] | None = None
        self._mender = ThreadPoolExecutor(1)

    @property
    def roles(self) -> list[Process]:
        return [*self.workers, *self.ingests, self.feed, self.replica, *(self.school.running() if self.school else [])]

    def begin(self, speed: float) -> None:
        """Starts everything."""
        self._speed = ["--speed", str(speed)]
        for process in self.roles:
            process.start()
        self.producer.start(*self._speed)

    def step(self) -> None:
        """What a supervisor does, and what is there to be seen; call it often."""
        now = time.monotonic()
        for process in [*self.roles, self.producer]:
            if process.running or process.name in self._due:
                continue
            code = process.exits.pop() if process.exits else None
            if process is self.producer and code == 0:
                self._produced = True
                continue
            if process is self.producer and self._produced:
                continue
            if code == -9:
                self.inside += 1
            elif code is not None:
                role = process.name.rstrip("0123456789")
                self.exits[role] = self.exits.get(role, 0) + 1
                self.error_lines.append(f"{process.name}: {process.tail().strip().splitlines()[-1][:300]}")
            self._start_later(process, 1.0)
        for name, (at, trap) in list(self._due.items()):
            if now >= at:
                del self._due[name]
                extra = {"produce": self._speed, "trainer": ["--follow"]}.get(name, [])
                self.stack.processes[name].start(*extra, trap=trap)
        self._wake(now)
        if self._mending is not None and self._mending.done():
            mended, self._mending = self._mending, None
            mended.result()
        if self.school:
            self.school.step(sum(part.sessions for part in self.stack.progress().values()))
        self._observe()

    def _start_later(self, process: Process, seconds: float, trap: str = "") -> None:
        self._due[process.name] = (time.monotonic() + seconds, trap)

    def _wake(self, now: float) -> None:
        """Processes that froze themselves are woken some time after the others have taken over."""
        for process in [*self.workers, *self.ingests]:
            if process.running and not process.frozen and process.is_stopped():
                process.frozen = True
                self.freezes += 1
                patience = self.stack.config.kafka.session_timeout_ms / 1000
                self._waking.append((now + patience * self.rng.uniform(1.3, 3.0), process))
        for at, process in list(self._waking):
            if now >= at or not process.running:
                self._waking.remove((at, process))
                if process.running and process.is_stopped():
                    process.wake()

    def _observe(self) -> None:
        self.stack.progress()
        for fault in self.faults:
            if fault.seconds is not None:
                continue
            for part, at_ms in self.stack.newest.items():
                reached = self.stack.state_of(part)
                if part not in fault.seen and at_ms / 1000 > fault.at and reached > fault.offsets.get(part, -1):
                    fault.seen[part] = at_ms / 1000
            done = fault.done(fault)
            if done is not None:
                fault.seconds = done - fault.at

    def _ends(self) -> dict[int, int]:
        """Committed ends of `events` by partition, as far as the broker answers."""
        config = self.stack.config.kafka
        asked = {TopicPartition(config.named("events"), part): OffsetSpec.latest() for part in range(config.partitions)}
        with suppress(KafkaException):
            found = self._admin.list_offsets(asked, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=5)
            self._known_offsets = {part.partition: future.result().offset - 1 for part, future in found.items()}
        return self._known_offsets

    def _all_seen(self, fault: Fault) -> float | None:
        return max(fault.seen.values()) if len(fault.seen) == self.stack.config.kafka.partitions else None

    def _reader_at(self, process: Process, name: str, value: int) -> Callable[[Fault], float | None]:
        """Done when a local state has come to `value` of a counter, looked at once a second."""

        def done(fault: Fault) -> float | None:
            now = time.time()
            if not process.running or now - self._watched < 1.0:
                return None
            self._watched = now
            assert process.state is not None
            with suppress(OneRecError), Reader(process.state) as reader:
                if getattr(reader.counters(), name) >= value:
                    return time.time()
            return None

        return done

    def strike(self, kind: str) -> bool:
        """One fault of a kind; False where no process is there to be hit, then try again a little later."""
        role, _, how = kind.partition(", ")
        role, inside, _ = role.partition(" inside")
        candidates = {
            "worker": self.workers, "ingest": self.ingests, "feeder": [self.feed], "replica": [self.replica],
            "producer": [self.producer], "trainer": [self.school.trainer] if self.school else [],
        }.get(role, [])
        alive = [process for process in candidates if process.running and not process.frozen]
        if role == "producer" and (self._produced or not alive):
            return False
        if role != "broker" and (not alive or (role == "worker" and len(alive) < 2 and len(self.workers) > 1)):
            return False
        for other in self.faults:
            if other.seconds is None:
                other.alone = False
        fault = Fault(kind, time.time(), self._all_seen, alone=all(one.seconds is not None for one in self.faults))
        if role == "broker":
            self.broker.kill()
            self._mending = self._mender.submit(self._mend, self.rng.uniform(0.0, 3.0))
        else:
            victim = self.rng.choice(alive)
            # A worker's own progress will do; for those before it, something that they had not yet written has to arrive.
            if role in ("ingest", "producer"):
                fault.offsets = dict(self._ends())
            parts = self.stack.progress().values()
            if role == "feeder":
                fault.done = self._reader_at(victim, "sessions", sum(part.sessions for part in parts))
            elif role == "replica":
                fault.done = self._reader_at(victim, "events", sum(part.counters.events for part in parts))
            elif role == "trainer":
                assert self.school is not None
                fault.done = self.school.learnt
            victim.kill()
            self._damage(victim, how)
            trap = ""
            if inside:
                trap = self._trap("kill", role)
            elif role in ("worker", "ingest") and self.rng.random() < 0.1:
                trap = self._trap("freeze", role)
            self._start_later(victim, self.rng.choice((0.0, 0.0, 1.0, 3.0)), trap)
        self.faults.append(fault)
        return True

    def _mend(self, seconds: float) -> None:
        time.sleep(seconds)
        self.broker.start(RECOVERY)

    def _trap(self, action: str, role: str) -> str:
        """The process started next will die or freeze by itself, inside a step."""
        step = self.rng.choice(STORE_STEPS if role == "worker" else INGEST_STEPS)
        count = self.rng.randrange(1, 3) if step.startswith(("open", "close")) else self.rng.randrange(1, 40)
        return f"{action}:{step}:{count}"

    def _damage(self, victim: Process, how: str) -> None:
        earlier, copy = (self.stack.root / f"{victim.name}.{name}" for name in ("earlier", "copy"))
        if how == "disk wiped":
            victim.wipe()
        elif how == "disk of earlier" and victim.state is not None and victim.state.exists():
            victim.keep(copy)
            if earlier.exists():
                victim.put_back(earlier)
                shutil.rmtree(earlier)
            copy.rename(earlier)

    def handover(self) -> None:
        """A planned one: a worker is stopped and started again."""
        alive = [process for process in self.workers if process.running and not process.frozen]
        if len(alive) > 1:
            victim = self.rng.choice(alive)
            code = victim.stop()
            assert code == 0, f"{victim.name} ended with {code} on SIGTERM\n{victim.tail()}"
            self.stops += 1
            self._start_later(victim, self.rng.uniform(0.0, 4.0))

    def run(self, kinds: list[str], seconds: float, tell: Callable[[str], None] = lambda text: None) -> None:
        """The kills, spread over the time; a planned hand-over after every tenth. Stops early where the log ends.

        Raises StackError or TooSlow where the system does not recover.
        """
        self._until(lambda: self.stack.events() > 0, RECOVERY, "the first events")
        for number, kind in enumerate(kinds):
            at = time.monotonic() + seconds / len(kinds) * self.rng.uniform(0.2, 1.8)
            self._until(lambda: time.monotonic() >= at, 3_600, "time to pass")  # noqa: B023
            self._until(lambda: self._ready() or self._produced, RECOVERY, "recovery")
            self._until(lambda: self._produced or self.strike(kind), 60, f"{kind} to be there")  # noqa: B023
            if self._produced:
                tell("the log has come to its end")
                return
            tell(f"{number + 1}: {kind}; {self.stack.events():,} events applied")
            if number % 10 == 9:
                self.handover()

    def _until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        def reached() -> object:
            self.step()
            return condition()

        self.stack.wait(reached, seconds, what, data=True, exits=True)

    def _ready(self) -> bool:
        """Whether the next fault may come."""
        return self._mending is None and sum(fault.seconds is None for fault in self.faults) < PENDING

    def finish(self, seconds: float) -> float:
        """Lets the rest of the log through flat out; seconds until its end. Raises StackError or TooSlow."""
        began = time.monotonic()
        if not self._produced and self.producer.running:
            self.producer.kill()
        self._speed = []
        self._until(self.stack.ended, seconds, "the end of the log")
        return time.monotonic() - began

    def stop(self, seconds: float = 300) -> None:
        """Brings feeder and replica to the end of their topics and stops everything."""
        for process in self.roles:
            if process.running and process.is_stopped():
                process.wake()
        if self.feed.running:
            self.feed.kill()
        if self.replica.running:
            self.replica.kill()
        self.stack.drain(self.feed, self.replica, seconds=seconds)
        if self.school:
            self.school.finish(seconds)
        self.stack.close()

    def recoveries(self) -> dict[str, dict[str, Any]]:
        """Kind → kills, and seconds to recovery: of all, and of those with no other fault in their recovery."""
        found: dict[str, dict[str, Any]] = {}
        for kind in sorted({fault.kind for fault in self.faults}):
            mine = [fault for fault in self.faults if fault.kind == kind]
            known = [fault.seconds for fault in mine if fault.seconds is not None]
            alone = [fault.seconds for fault in mine if fault.seconds is not None and fault.alone]
            found[kind] = {
                "kills": len(mine), "seconds_median": _median(known), "seconds_max": max(known, default=None),
                "alone": len(alone), "alone_median": _median(alone), "alone_max": max(alone, default=None),
            }
        return found


class School:
    """A trainer that learns without end from one partition's sessions, fed by a feeder of its own."""

    FIRST_SESSIONS = 2_000

    def __init__(self, stack: Stack) -> None:
        self.feed = stack.feeder(0, stack.config.kafka.partitions)
        assert self.feed.state is not None
        self.state = self.feed.state
        self.run = stack.root / "train"
        self._options = settings(TRAIN)
        self._items = stack.process("items", "items", "--state", self.state)
        self.trainer = stack.process(
            "trainer", "train", "--state", self.state, "--run", self.run, "--json", *self._options
        )
        self._begun = self._coded = False
        self.report: dict[str, Any] = {}

    def running(self) -> list[Process]:
        """What a supervisor has to look after."""
        return [self.feed, *([self.trainer] if self._coded else [])]

    def step(self, sessions: int) -> None:
        """Fits a codebook once there are sessions enough, then starts the trainer."""
        if not self._begun and sessions >= self.FIRST_SESSIONS:
            self._items.start()
            self._begun = True
        elif self._begun and not self._coded and not self._items.running:
            assert self._items.exits.pop() == 0, self._items.tail()
            self.trainer.start("--follow")
            self._coded = True

    def learnt(self, fault: Fault) -> float | None:
        """When the first checkpoint after a fault was there."""
        with suppress(OSError):
            times = [path.stat().st_mtime for path in (self.run / "checkpoints").iterdir()]
            return min((at for at in times if at > fault.at), default=None)
        return None

    def finish(self, seconds: float) -> None:
        """Lets the trainer learn the rest, and counts."""
        for process in (self.feed, self.trainer):
            if process.running:
                process.kill()
        self.feed.start("--until-end").result(seconds)
        result = orjson.loads(self.trainer.start().result(seconds).splitlines()[-1])
        with Reader(self.state) as reader:
            counters = reader.counters()
        self.report = {"log": counters.high_quality, "learnt": result["sessions"], "steps": result["steps"]}


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def make_log(folder: Path, shape: Shape) -> tuple[Path, Reference]:
    """A log and its reference."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    write(log, lines(shape))
    found = reference(log, folder / "reference")
    shutil.rmtree(folder / "reference")
    return log, found
