"""The topic `progress`: what every partition of the stream has come to, the settings of the log, what was produced."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition

from onerec.closing import Closing
from onerec.errors import Failure, UserError
from streaming.kafka import codes, settings
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import SETTINGS_KEY, Progress, decode_progress, encode_settings
from streaming.semantics import Semantics

TOPIC: Final = "progress"
_PARTITION: Final = b"partition:"
_PRODUCE: Final = b"produce:"


class _Settings(msgspec.Struct):
    version: int
    partitions: int
    semantics: Semantics


class ProgressLog(Closing):
    """A reader of `progress`; what it knows is as of the last `refresh`.

    `partitions`: partition → progress; `settings`: the semantic values of the log, None before its first worker;
    `partition_count`: of the log, None likewise; `produced`: source name → position bytes.
    """

    def __init__(self, config: KafkaConfig) -> None:
        self.partitions: dict[int, Progress] = {}
        self.produced: dict[str, bytes] = {}
        self.settings: Semantics | None = None
        self.partition_count: int | None = None
        self._topic = config.named(TOPIC)
        self._consumer = Consumer(
            settings.consumer(config, group_id=config.named("progress-reader"), enable_partition_eof=True)
        )
        self._consumer.assign([TopicPartition(self._topic, 0, OFFSET_BEGINNING)])
        self._ended = False

    def refresh(self, timeout: float = 30.0) -> None:
        """Reads on to the end as of now. Raises Failure if the broker does not answer in `timeout` seconds."""
        deadline = time.monotonic() + timeout
        first = True
        while first or not self._ended:
            messages = self._consumer.consume(1_000, 0.02 if self._ended else 0.2)
            first = False
            if messages:
                self._ended = False
            for message in messages:
                error = message.error()
                if error is None:
                    self._take(message.key(), message.value(), message.offset() or 0)
                elif error.code() == codes.END_OF_PARTITION:
                    self._ended = True
                elif not error.retriable() and error.code() not in codes.AWAY:
                    raise Failure(f"topic {self._topic}: {error.str()}; `onerec topics` says what is wrong")
            if time.monotonic() > deadline:
                raise Failure(f"topic {self._topic}: the broker did not answer in {timeout:.0f} s; is it up?")

    def _take(self, key: bytes | None, value: bytes | None, offset: int) -> None:
        if key is None or value is None:
            return
        place = f"topic {self._topic}, offset {offset}"
        if key.startswith(_PARTITION):
            found = decode_progress(value, place)
            self.partitions[found.partition] = found
        elif key.startswith(_PRODUCE):
            self.produced[key[len(_PRODUCE) :].decode()] = value
        elif key == SETTINGS_KEY:
            try:
                stored = msgspec.json.decode(value, type=_Settings)
            except msgspec.MsgspecError as error:
                raise Failure(f"{place}: no settings of this version of onerec ({error})") from None
            self.settings, self.partition_count = stored.semantics, stored.partitions

    def close(self) -> None:
        """Leaves the broker."""
        self._consumer.close()


def agree(config: KafkaConfig, semantics: Semantics) -> None:
    """Writes the settings of the log if it has none, and checks ours against them.

    Raises UserError where the log was built with other semantic values or another partition count.
    """
    from streaming.store import difference

    with ProgressLog(config) as log:
        log.refresh()
        if log.settings is None:
            _write(config, encode_settings(semantics, config.partitions))
            log.refresh()
            while log.settings is None:
                log.refresh()
        if log.partition_count != config.partitions:
            raise UserError(
                f"the log {config.prefix!r} at {config.bootstrap} has {log.partition_count} partitions, kafka.partitions is "
                f"{config.partitions}; the count is fixed, as a user's state lives in its partition. Use {log.partition_count},"
                " or replay the raw events into topics of a new kafka.prefix"
            )
        if log.settings != semantics:
            raise UserError(
                f"the log {config.prefix!r} at {config.bootstrap} was built with other settings: "
                f"{difference(log.settings, semantics)}; use those, or another kafka.prefix"
            )


def _write(config: KafkaConfig, value: bytes) -> None:
    failed: list[Any] = []
    producer = Producer(settings.producer(config))
    producer.produce(
        config.named(TOPIC), value, SETTINGS_KEY, partition=0, on_delivery=lambda error, message: failed.append(error)
    )
    if producer.flush(30) or any(failed):
        raise KafkaException(failed[0] if failed else KafkaError(codes.TIMED_OUT))
