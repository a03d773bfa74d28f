"""A paced producer of its own: live traffic whose event times are now, or the lines of a log, at so many events a second."""

from __future__ import annotations

import random
import time
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson
from confluent_kafka import Producer

from benchmarks.kafka_tools import Cluster

TICK_SECONDS: Final = 0.02
WATCH_EVERY_MS: Final = 700
"""Between two events of a user in a session."""
ITEMS: Final = 5_000

Event = tuple[str, bytes, bytes]
"""Topic, user id, line."""


def probe(number: int) -> str:
    """The user of the n-th probe: one watch, whose item id tells when it was sent."""
    return f"p{number}"


class Traffic:
    """Users in sessions of 5 to 25 events, one of ten an interaction; one probe a tick."""

    def __init__(self, rate: int, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._count = max(1, rate * WATCH_EVERY_MS // 1000)
        # Nobody comes back within the gap: three times as many users as are active wait in a queue.
        self._waiting = deque(range(self._count, 4 * self._count))
        self._users = list(range(self._count))
        self._left = [self._random.randint(1, 25) for _ in self._users]
        self._last = [f"v{self._random.randrange(ITEMS)}" for _ in self._users]
        self._slot = 0
        self.probes = 0

    def probe(self, ts: int) -> Event:
        """A user nobody has seen, and one watch."""
        user = probe(self.probes)
        self.probes += 1
        return "watch", user.encode(), (
            f'{{"type":"watch","user_id":"{user}","item_id":"i{ts}","ts":{ts},"watch_ms":9000,"duration_ms":30000}}'.encode()
        )

    def event(self, ts: int) -> Event:
        """The next event of the next user in turn."""
        slot = self._slot
        self._slot = (slot + 1) % self._count
        chance = self._random.random
        if not self._left[slot]:
            self._waiting.append(self._users[slot])
            self._users[slot] = self._waiting.popleft()
            self._left[slot] = self._random.randint(5, 25)
        self._left[slot] -= 1
        user = f"u{self._users[slot]}"
        if chance() < 0.1:
            line = f'{{"type":"like","user_id":"{user}","item_id":"{self._last[slot]}","ts":{ts}}}'
            return "interactions", user.encode(), line.encode()
        item = self._last[slot] = f"v{int(ITEMS * chance() ** 2)}"
        line = (f'{{"type":"watch","event_id":null,"user_id":"{user}","item_id":"{item}","ts":{ts},'
                f'"watch_ms":{int(60_000 * chance())},"duration_ms":30000,"request_id":null}}')
        return "watch", user.encode(), line.encode()


class Sender:
    """Packs lines of a partition that come within a tick, `pack` at most, into one message."""

    def __init__(self, cluster: Cluster, pack: int) -> None:
        self._names = {name: cluster.config.named(name) for name in ("watch", "interactions")}
        self._partitions, self._pack = cluster.partitions, pack
        self._held: dict[tuple[str, int], list[bytes]] = {}
        self._producer = Producer({
            "bootstrap.servers": cluster.bootstrap, "enable.idempotence": True, "compression.type": "lz4", "linger.ms": 5,
            "queue.buffering.max.messages": 1_000_000,
        })

    def send(self, event: Event) -> None:
        """Takes one event."""
        topic, user, line = event
        place = topic, zlib.crc32(user) % self._partitions
        if self._pack == 1:
            self._produce(place, line)
            return
        held = self._held.setdefault(place, [])
        held.append(line)
        if len(held) == self._pack:
            self._produce(place, b"\n".join(self._held.pop(place)))

    def _produce(self, place: tuple[str, int], value: bytes) -> None:
        while True:
            try:
                self._producer.produce(self._names[place[0]], value, None, place[1])
                return
            except BufferError:
                self._producer.poll(0.05)

    def tick(self) -> None:
        """Sends what is held."""
        for place, lines in self._held.items():
            self._produce(place, b"\n".join(lines))
        self._held.clear()
        self._producer.poll(0)

    def end(self) -> None:
        """Waits until all is delivered."""
        self.tick()
        self._producer.flush(60)


def live(cluster: Cluster, rate: int, seconds: float, pack: int) -> dict[str, Any]:
    """Live traffic for so long. `behind_ms` is how late the producer itself was at worst, which the figures then hold too."""
    traffic, sender = Traffic(rate), Sender(cluster, pack)
    began = time.monotonic()
    sent, behind = 0, 0.0
    while (elapsed := time.monotonic() - began) < seconds:
        due = int(rate * elapsed)
        ts = time.time_ns() // 1_000_000
        if due > sent:
            sender.send(traffic.probe(ts))
        for _ in range(due - sent):
            sender.send(traffic.event(ts))
        sent = due
        sender.tick()
        wait = began + elapsed + TICK_SECONDS - time.monotonic()
        behind = max(behind, -wait)
        if wait > 0:
            time.sleep(wait)
    sender.end()
    return {"events": sent + traffic.probes, "probes": traffic.probes, "seconds": time.monotonic() - began,
            "behind_ms": round(1000 * behind)}


def _events(log: Path) -> Iterator[Event]:
    with log.open("rb") as file:
        for line in file:
            fields = orjson.loads(line)
            yield "watch" if fields["type"] == "watch" else "interactions", fields["user_id"].encode(), line.rstrip()


def paced(cluster: Cluster, log: Path, rate: int, pack: int) -> dict[str, Any]:
    """The lines of a log in their order, event times as they are."""
    sender = Sender(cluster, pack)
    began = time.monotonic()
    sent = 0
    for event in _events(log):
        sender.send(event)
        sent += 1
        if sent % (rate // 50) == 0:
            sender.tick()
            wait = began + sent / rate - time.monotonic()
            if wait > 0:
                time.sleep(wait)
    sender.end()
    return {"events": sent, "seconds": time.monotonic() - began}
