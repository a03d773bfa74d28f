"""What stands in Kafka and in the local states against the reference: nothing lost, nothing double, no byte different."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from reference_log import COUNTED, Reference, onerec

from streaming.kafka.outbox import wait_decided
from streaming.kafka.settings import KafkaConfig, consumer
from streaming.kafka.wire import NOTHING, PROGRESS_KEY, Progress, decode_progress
from streaming.state import history_of, is_seen

SHOWN = 3
"""Examples named of each fault."""


class Tail:
    """Committed messages of a topic from the beginning on, as far as they are there."""

    def __init__(self, config: KafkaConfig, topic: str) -> None:
        self.topic = topic
        self._config = config
        self._consumer = Consumer(
            {**consumer(config, group_id="comparison", auto_offset_reset="earliest", enable_partition_eof=True), "log_level": 0}
        )
        found = self._consumer.list_topics(config.named(topic), timeout=60).topics[config.named(topic)]
        self._parts = sorted(found.partitions)
        self._consumer.assign([TopicPartition(config.named(topic), part, 0) for part in self._parts])

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._consumer.close()

    def ready(self, seconds: float = 0.0) -> list[Message]:
        """What has come by now; waits `seconds` at most for the first."""
        return [message for message in self._consumer.consume(10_000, seconds) if message.error() is None]

    def rest(self, seconds: float = 60.0) -> Iterator[Message]:
        """Everything up to the present end of every partition. Raises KafkaException where an end is not reached.

        A commit is answered a moment before readers see it: transactions that are open now are waited for.
        """
        wait_decided(self._config, [self.topic])
        missing = set(self._parts)
        while missing:
            message = self._consumer.poll(seconds)
            if message is None:
                raise KafkaException(f"{self.topic}: no message and no end of partitions {sorted(missing)} in {seconds} s")
            error = message.error()
            if error is None:
                missing.add(message.partition())
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:
                missing.discard(message.partition())
            elif not error.retriable():
                raise KafkaException(error)


def read_progress(config: KafkaConfig) -> dict[int, Progress]:
    """The last progress of every partition of the stream."""
    with Tail(config, "progress") as tail:
        return fold_progress({}, tail.rest())


def fold_progress(known: dict[int, Progress], messages: Iterator[Message] | list[Message]) -> dict[int, Progress]:
    """`known` with the messages of `progress` put in."""
    for message in messages:
        if message.key().startswith(b"partition:") and message.value():
            found = decode_progress(message.value(), "progress")
            known[found.partition] = found
    return known


@dataclass
class Verdict:
    """How far a run is from the reference; `faults` empty means: not at all."""

    sessions: int = 0
    lost: int = 0
    double: int = 0
    different: int = 0
    faults: list[str] = field(default_factory=list)

    def fault(self, place: str, what: str, found: list[Any]) -> None:
        """Notes what is wrong, with a few examples."""
        if found:
            self.faults.append(f"{place}: {len(found)} {what}: {', '.join(str(one)[:300] for one in found[:SHOWN])}")

    def report(self) -> str:
        """Every fault on a line of its own."""
        return "\n".join(self.faults)

    def summary(self) -> dict[str, Any]:
        return {"sessions": self.sessions, "lost": self.lost, "double": self.double, "different": self.different,
                "faults": self.faults}


def judge_sessions(verdict: Verdict, messages: Iterable[Message], wanted: Reference) -> None:
    """Topic `sessions`: each of the reference once, its bytes, positions 1, 2, 3 … within each partition."""
    place = "topic sessions"
    seen: Counter[str] = Counter()
    different: list[str] = []
    keys: list[str] = []
    last: dict[int, int] = {}
    holes: list[str] = []
    for message in messages:
        value = message.value()
        fields = orjson.loads(value)
        session_id, (partition, sequence) = fields["session_id"], fields["position"]
        seen[session_id] += 1
        line = value[: value.rindex(b',"position":[')] + b"}"
        if session_id in wanted.sessions and line != wanted.sessions[session_id]:
            different.append(f"{line!r} instead of {wanted.sessions[session_id]!r}")
        if message.key() != fields["user_id"].encode() or message.partition() != partition:
            keys.append(session_id)
        if sequence != last.get(partition, 0) + 1:
            holes.append(f"partition {partition}: {sequence} after {last.get(partition, 0)}")
        last[partition] = sequence
    verdict.sessions = sum(seen.values())
    _count(verdict, place, seen, wanted)
    verdict.different += len(different)
    verdict.fault(place, "sessions differ", different)
    verdict.fault(place, "sessions with a wrong key or partition", keys)
    verdict.fault(place, "breaks in the sequence of positions", holes)


def _count(verdict: Verdict, place: str, seen: Counter[str], wanted: Reference) -> None:
    lost = [one for one in wanted.sessions if one not in seen]
    double = [one for one, count in seen.items() if count > 1]
    verdict.lost += len(lost)
    verdict.double += sum(seen[one] - 1 for one in double)
    verdict.fault(place, "sessions lost", lost)
    verdict.fault(place, "sessions more than once", double)
    verdict.fault(place, "sessions that the reference has not", [one for one in seen if one not in wanted.sessions])


def judge_changelog(verdict: Verdict, config: KafkaConfig, length: int, wanted: Reference) -> None:
    """Topic `histories`, folded by key as compaction does: what a worker with an empty disk would restore."""
    pairs: dict[str, dict[bytes, bytes]] = {}
    progress: dict[int, Progress] = {}
    owner: dict[str, int] = {}
    strangers: list[str] = []
    with Tail(config, "histories") as tail:
        for message in tail.rest():
            key, value = message.key(), message.value()
            if key == PROGRESS_KEY:
                progress[message.partition()] = decode_progress(value, "histories")
                continue
            user_id = key[1:].decode()
            if owner.setdefault(user_id, message.partition()) != message.partition():
                strangers.append(user_id)
            stored = pairs.setdefault(user_id, {})
            if value is None or value == NOTHING:
                stored.pop(key[:1], None)
            else:
                stored[key[:1]] = value
    lines = []
    for user_id in sorted(pairs, key=str.encode):
        base = pairs[user_id].get(b"b")
        if base is not None and is_seen(base):
            lines.append(orjson.dumps({"user_id": user_id, "items": history_of(pairs[user_id].get(b"l"), base, length)}))
    _judge_histories(verdict, "topic histories", lines, wanted)
    verdict.fault("topic histories", "users in two partitions", strangers)
    last = read_progress(config)
    verdict.fault("topic histories", "partitions whose progress is not that of `progress`", [
        f"{part}: {progress.get(part)} and {last.get(part)}" for part in progress.keys() | last.keys()
        if progress.get(part) != last.get(part)
    ])


def _judge_histories(verdict: Verdict, place: str, lines: list[bytes], wanted: Reference) -> None:
    found, right = ({orjson.loads(line)["user_id"]: line for line in rows} for rows in (lines, wanted.histories))
    verdict.fault(place, "histories missing", [user for user in right if user not in found])
    verdict.fault(place, "histories that the reference has not", [user for user in found if user not in right])
    wrong = [user for user in right if user in found and found[user] != right[user]]
    verdict.different += len(wrong)
    verdict.fault(place, "histories differ", [f"{found[user]!r} instead of {right[user]!r}" for user in wrong])


def judge_counters(verdict: Verdict, config: KafkaConfig, wanted: Reference) -> None:
    """Topic `progress` summed over the partitions; refused lines are counted in the topic `dead-letters`."""
    parts = read_progress(config).values()
    totals = {name: sum(getattr(part.counters, name) for part in parts) for name in COUNTED if name != "dead_letters"}
    right = {name: wanted.counters[name] for name in totals}
    if totals != right:
        verdict.faults.append(f"counters: {totals} instead of {right}")
    verdict.fault("progress", "partitions whose sequence is not their count of sessions",
                  [part for part in parts if part.sessions != part.counters.sessions])
    with Tail(config, "dead-letters") as tail:
        sources = Counter(dict(message.headers() or []).get("source", b"?") for message in tail.rest())
    if sum(sources.values()) != wanted.counters["dead_letters"]:
        verdict.faults.append(f"dead letters: {sum(sources.values())} instead of {wanted.counters['dead_letters']}")
    verdict.fault("dead letters", "sources more than once", [one for one, count in sources.items() if count > 1])


def judge_feed(verdict: Verdict, states: list[Path], wanted: Reference) -> None:
    """What the feeders put into the trainers' session logs."""
    seen: Counter[str] = Counter()
    different = []
    for state in states:
        for line in onerec("sessions", "--state", state, "--json").splitlines():
            session_id = orjson.loads(line)["session_id"]
            seen[session_id] += 1
            if line != wanted.sessions.get(session_id, line):
                different.append(session_id)
    _count(verdict, "feed", seen, wanted)
    verdict.different += len(different)
    verdict.fault("feed", "sessions differ", different)


def judge_replica(verdict: Verdict, state: Path, wanted: Reference) -> None:
    """What a serving host would look up."""
    _judge_histories(verdict, "replica", onerec("histories", "--state", state, "--json").splitlines(), wanted)


def judge(
    config: KafkaConfig, length: int, wanted: Reference, *, feeds: list[Path] | None = None,
    replica: Path | None = None,
) -> Verdict:
    """Everything that a run has left, against the reference."""
    verdict = Verdict()
    with Tail(config, "sessions") as tail:
        judge_sessions(verdict, tail.rest(), wanted)
    judge_changelog(verdict, config, length, wanted)
    judge_counters(verdict, config, wanted)
    if feeds:
        judge_feed(verdict, feeds, wanted)
    if replica is not None:
        judge_replica(verdict, replica, wanted)
    return verdict
