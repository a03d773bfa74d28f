"""Where the partitions of `events` begin and end for a reader of committed records, asked from the broker in a thread.

An engine cannot tell by itself: a client that stopped fetching knows no new end, and after the last event of a transaction
comes its marker, so that the end lies one offset behind the last message although nothing is left to read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from onerec.errors import Failure, UserError
from streaming.kafka import codes, settings, topics
from streaming.kafka.settings import KafkaConfig

SECONDS: Final = 0.5
"""Between two questions to the broker."""
ANSWER_SECONDS: Final = 5.0
PROBE_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 1.0
"""Then a question still open at the end is left to the end of the process."""
INSIST_SECONDS: Final = 60.0
"""How long a broker may take to come back before a worker that needs an answer leaves."""


class LogEnds:
    """`positions()` gives the next offset to read of every partition that is of interest; ends are as of `answered_at`."""

    def __init__(self, config: KafkaConfig, positions: Callable[[], dict[int, int]]) -> None:
        self._topic = config.named("events")
        self._positions = positions
        self._config = config
        self._admin = self._connect()
        self._reader = Consumer(
            settings.consumer(
                config, group_id=config.named("stream-ends"), enable_partition_eof=True,
                queued_max_messages_kbytes=4_096, fetch_message_max_bytes=65_536,
            )
            | {"log_level": 0}
        )
        self._ends: dict[int, int] = {}
        self._looked: dict[int, tuple[int, int]] = {}
        self._empty: dict[int, tuple[int, int]] = {}
        self._before: dict[int, int] = {}
        self.refusal: UserError | None = None
        """Why the broker does not let us in any more: what was right at the start has been changed there."""
        self.answered_at = 0.0
        """Monotonic time of the broker's last answer; 0 before the first."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-ends", daemon=True)
        self._thread.start()

    def lag(self, partition: int, position: int) -> int | None:
        """Offsets between the next to read and the end, 0 where no message lies in between; None while the end is unknown."""
        end = self._ends.get(partition)
        if end is None:
            return None
        return 0 if self._empty.get(partition) == (position, end) else max(0, end - position)

    def first(self, partitions: list[int]) -> dict[int, int]:
        """The oldest offset that Kafka still has. Raises Failure if the broker does not answer for long."""
        return self._insist(partitions, OffsetSpec.earliest())

    def end(self, partitions: list[int]) -> dict[int, int]:
        """The end as of now. Raises Failure if the broker does not answer for long."""
        return self._insist(partitions, OffsetSpec.latest())

    def close(self) -> None:
        """Ends the thread and leaves the broker."""
        self._stopping.set()
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._reader.close()

    def _insist(self, partitions: list[int], which: OffsetSpec) -> dict[int, int]:
        deadline = time.monotonic() + INSIST_SECONDS
        while True:
            try:
                return self._ask(partitions, which)
            except Failure:
                if time.monotonic() > deadline or self._stopping.wait(SECONDS):
                    raise

    def _ask(self, partitions: list[int], which: OffsetSpec) -> dict[int, int]:
        if not partitions:
            return {}
        admin = self._admin
        try:
            found = admin.list_offsets(
                {TopicPartition(self._topic, partition): which for partition in partitions},
                isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=ANSWER_SECONDS,
            )
            return {place.partition: future.result(ANSWER_SECONDS + 1).offset for place, future in found.items()}
        except (KafkaException, TimeoutError) as error:
            admin.poll(0)
            # A client that knew the broker before it went keeps asking with the leader's old epoch.
            self._admin = self._connect()
            raise Failure(f"topic {self._topic}: the broker does not say where it begins and ends ({error})") from None

    def _connect(self) -> AdminClient:
        table: dict[str, Any] = {**settings.client(self._config), "log_level": 0, "error_cb": self._heard}
        return AdminClient(table)

    def _heard(self, error: KafkaError) -> None:
        # TLS faults do not count: a broker that restarts cuts connections in the middle.
        if error.code() in (codes.AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED):
            self.refusal = topics.refused(self._config, error)

    def _run(self) -> None:
        while not self._stopping.wait(SECONDS):
            positions = self._positions()
            try:
                # Also without a partition of ours: whether the broker still lets us in shows in its answers alone.
                ends = self._ask(list(positions) or [0], OffsetSpec.latest())
            except Failure:
                continue
            self._ends = ends
            self.answered_at = time.monotonic()
            # Those that did not move since the last question: does anything lie between position and end?
            still = {
                partition: (position, ends[partition]) for partition, position in positions.items()
                if position < ends[partition] and self._before.get(partition) == position
            }
            self._before = positions
            asked = {partition: span for partition, span in still.items() if self._looked.get(partition) != span}
            if asked:
                self._probe(asked)

    def _probe(self, spans: dict[int, tuple[int, int]]) -> None:
        left = dict(spans)
        self._reader.assign([TopicPartition(self._topic, partition, span[0]) for partition, span in spans.items()])
        deadline = time.monotonic() + PROBE_SECONDS
        while left and time.monotonic() < deadline and not self._stopping.is_set():
            for message in self._reader.consume(100, 0.1):
                partition, error = message.partition(), message.error()
                span = left.get(-1 if partition is None else partition)
                if span is None or partition is None:
                    continue
                if error is None:
                    self._looked[partition] = left.pop(partition)
                elif error.code() == codes.END_OF_PARTITION and (message.offset() or 0) >= span[1]:
                    self._empty[partition] = self._looked[partition] = left.pop(partition)
        self._reader.unassign()
