"""Error codes of librdkafka by public names, and what may be done about them."""

# ruff: noqa: SLF001 - the client names its local errors with an underscore
from __future__ import annotations

from typing import Final

from confluent_kafka import KafkaError

END_OF_PARTITION: Final = KafkaError._PARTITION_EOF
FORGOTTEN: Final = KafkaError._AUTO_OFFSET_RESET
"""The offset asked for is not in the log any more (or not yet)."""
STATE: Final = KafkaError._STATE
TIMED_OUT: Final = KafkaError._TIMED_OUT
QUEUE_FULL: Final = KafkaError._QUEUE_FULL
AUTHENTICATION: Final = KafkaError._AUTHENTICATION
NO_TOPIC: Final = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)
AWAY: Final = (
    KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError._TIMED_OUT, KafkaError._WAIT_COORD,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.NOT_COORDINATOR,
    KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.REQUEST_TIMED_OUT,
    KafkaError.BROKER_NOT_AVAILABLE,
)
"""The broker is away for now; the client keeps trying."""
FENCED: Final = (
    KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED,
    KafkaError.INVALID_PRODUCER_ID_MAPPING,
)
"""Another process has taken over our transactional id."""
