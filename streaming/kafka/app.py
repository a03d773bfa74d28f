"""The default engine: a Faust application. Faust reads, balances and delivers; the store decides what is applied.

Faust's own tables, commits and `exactly_once` are not used: they lost and doubled events in every fault tried. What follows
depends on its internals, so its version is pinned; the order of its callbacks is told in docs/kafka.md.
"""

# ruff: noqa: SLF001 - Faust builds its consumer with settings that it gives no other way to change
from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final, cast

import faust
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from faust.app.base import BootStrategy
from faust.auth import SASLCredentials, SSLCredentials
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport, ensure_aiokafka_TP
from faust.types import TP
from mode.threads import WorkerThread

from onerec.errors import Failure, OneRecError
from streaming.kafka import settings
from streaming.kafka.engine import BATCH_MESSAGES, FETCH_BYTES, Engine, message_number
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import Chunk

TICK_SECONDS: Final = 0.1
STOP_SECONDS: Final = 8.0
FETCH_WAIT_MS: Final = 50
"""Faust's own 1500 keep a partition that just ran dry waiting while the others of its broker have nothing new."""
BUFFERED_MESSAGES: Final = 2_048
"""Read ahead. When all partitions are full Faust sleeps a second: the buffer has to hold more than a second's work."""


class _Thread(WorkerThread):
    """A thread that does not keep a process alive that has to leave."""

    def __init__(self, service: Any, **options: Any) -> None:
        super().__init__(service, **options)
        self.daemon = True


class _ConsumerThread(AIOKafkaConsumerThread):
    """Faust's consumer, which reads committed records only, from where the store says."""

    Worker = _Thread

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS
        return consumer

    async def on_thread_stop(self) -> None:
        """As Faust does; a broker that is away makes it fail, which is nobody's concern any more."""
        with suppress(Exception, asyncio.CancelledError):
            await super().on_thread_stop()

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Instead of the group's offsets, which count what was handed out and not what was applied."""
        return await self.call_thread(self._seek_to_positions)

    async def _seek_to_positions(self) -> Mapping[TP, int]:
        found = self._positions()
        for tp, offset in found.items():
            self._ensure_consumer().seek(tp, offset)
        return found

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        # Nothing depends on it: a broker that is away must not end the worker over it.
        with suppress(KafkaError):
            known = {ensure_aiokafka_TP(tp): offset for tp, offset in self._positions().items()}
            if known:
                await self._ensure_consumer().commit(known)
        return True

    def _positions(self) -> dict[TP, int]:
        positions = cast(_App, self.app).engine.positions()
        return {tp: positions[tp.partition] for tp in self.assignment() if tp.partition in positions}


class _Consumer(Consumer):
    def _new_consumer_thread(self) -> _ConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)


class _Transport(Transport):
    Consumer = _Consumer


class _Boot(BootStrategy):
    """No producer: the store has its own. No web server."""

    enable_kafka_producer = False
    enable_web = False


class _App(faust.App):
    """Faust's application object, with the engine that its parts ask."""

    BootStrategy = _Boot
    engine: Engine

    def _new_transport(self) -> Any:
        return _Transport(self.conf.broker_consumer, self)

    def _create_directories(self) -> None:
        """None: nothing of ours is kept in Faust's folders."""


def credentials(config: KafkaConfig) -> SASLCredentials | SSLCredentials | None:
    """The security settings as Faust wants them. Raises UserError as `settings.security` does."""
    found = settings.security(config)
    context: ssl.SSLContext | None = None
    if found.protocol.endswith("SSL"):
        context = ssl.create_default_context(cafile=found.ca or None)
        if found.certificate:
            context.load_cert_chain(found.certificate, found.key or None, found.key_password or None)
    if found.protocol.startswith("SASL"):
        return SASLCredentials(
            username=found.username, password=found.password, ssl_context=context, mechanism=found.mechanism
        )
    return SSLCredentials(context) if context is not None else None


class StreamApp:
    """A worker of the Faust application `stream` over the topic `events`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._config = engine.config
        self._topic = engine.config.named("events")
        self._failure: BaseException | None = None
        self._leaving = False
        self._rebalancing_since: float | None = None

    def run(self) -> None:
        """Works until told to stop, or to the end. Raises Failure where the worker cannot go on."""
        for name in ("faust", "mode", "aiokafka", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        asyncio.run(self._main())

    def _build(self) -> _App:
        config = self._config
        session = config.session_timeout_ms / 1000
        app = _App(
            config.named("stream"),
            broker=[f"kafka://{address}" for address in config.bootstrap.split(",")],
            broker_credentials=credentials(config),
            broker_client_id="onerec",
            broker_session_timeout=session,
            broker_heartbeat_interval=session / 3,
            broker_rebalance_timeout=max(20.0, 3 * session),
            broker_request_timeout=max(40.0, 2 * session),
            broker_commit_interval=1.0,
            broker_max_poll_records=2 * BATCH_MESSAGES,
            consumer_max_fetch_size=FETCH_BYTES,
            stream_buffer_maxsize=BUFFERED_MESSAGES,
            stream_wait_empty=False,
            stream_recovery_delay=0.0,
            store="memory://",
            topic_disable_leader=True,
            topic_allow_declare=False,
            web_enabled=False,
            autodiscover=False,
        )
        app.engine = self._engine
        app.on_partitions_revoked.connect(cast(Any, self._revoked))
        app.on_rebalance_complete.connect(cast(Any, self._balanced))
        topic = app.topic(
            self._topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw", allow_empty=True
        )

        async def apply(stream: Any) -> None:
            async for events in stream.take_events(BATCH_MESSAGES, within=max(0.005, config.linger_ms / 1000)):
                # An exception in an agent would only be logged, and the agent started anew.
                try:
                    await self._apply(app, events)
                except Exception as error:
                    self._failure = error

        app.agent(topic, name="apply")(apply)
        return app

    async def _main(self) -> None:
        app = self._build()
        starting = asyncio.ensure_future(app.start())
        try:
            while not self._engine.stop.is_set() and not self._engine.ended():
                await asyncio.sleep(TICK_SECONDS)
                self._raise(app, starting)
                self._engine.check()
                if not app.rebalancing:
                    await self._taken_back(app)
            self._leaving = True
            self._engine.finish()
        finally:
            self._leaving = True
            starting.cancel()
            with suppress(Exception):
                await asyncio.wait_for(app.stop(), STOP_SECONDS)

    def _raise(self, app: _App, starting: asyncio.Future[None]) -> None:
        """What went wrong in a part of Faust."""
        found = self._failure or app.crash_reason or (starting.exception() if starting.done() else None)
        if isinstance(found, OneRecError):
            raise found
        if found is not None:
            raise Failure(f"Faust ended: {found!r}; leaving, so that a supervisor starts this worker anew") from found
        # Not counted while partitions are opened, which may take long.
        if not app.rebalancing or self._engine.opening():
            self._rebalancing_since = None
        elif self._rebalancing_since is None:
            self._rebalancing_since = time.monotonic()
        elif time.monotonic() - self._rebalancing_since > self._config.stall_seconds:
            raise Failure(
                f"Faust has not come out of a rebalance for {self._config.stall_seconds} s; leaving, so that a supervisor "
                "starts this worker anew"
            )

    async def _revoked(self, app: Any, revoked: Iterable[TP], **ignored: Any) -> None:
        """Faust revokes everything at each rebalance."""
        self._engine.revoke(tp.partition for tp in list(revoked))

    async def _balanced(self, app: Any, **ignored: Any) -> None:
        """The one hook that Faust waits for before it fetches: opened any later, messages would come too early."""
        try:
            assigned = [tp.partition for tp in app.consumer.assignment() if tp.topic == self._topic]
            self._engine.revoke(assigned)
            opening = self._engine.assign(assigned)
            if opening is not None:
                await asyncio.wait([asyncio.wrap_future(opening)])
            self._engine.opened()
        except Exception as error:
            self._failure = error

    async def _taken_back(self, app: _App) -> None:
        """Partitions that another process had taken over, once they are open again."""
        fenced = {TP(self._topic, partition) for partition in self._engine.fenced()}
        if fenced:
            app.consumer.pause_partitions(fenced)
        ready = {TP(self._topic, partition): offset for partition, offset in self._engine.opened().items()}
        if ready:
            app.consumer.resume_partitions(set(ready))
            await self._seek(app, ready)

    async def _seek(self, app: _App, offsets: dict[TP, int]) -> None:
        # Fails in the middle of a rebalance, after which everything is sought anew.
        with suppress(KafkaError, asyncio.TimeoutError):
            await app.consumer.seek_wait(offsets)

    async def _apply(self, app: _App, events: list[Any]) -> None:
        found: dict[int, list[Chunk]] = {}
        generation = app.consumer_generation_id
        for event in events:
            message = event.message
            if message.generation_id != generation or self._leaving:
                continue
            chunk = Chunk(
                message.offset, round(message.timestamp * 1000), message.value or b"", message_number(message.headers)
            )
            found.setdefault(message.partition, []).append(chunk)
        again = {partition: self._engine.apply(partition, chunks) for partition, chunks in found.items()}
        offsets = {TP(self._topic, partition): offset for partition, offset in again.items() if offset is not None}
        if offsets:
            await self._seek(app, offsets)
