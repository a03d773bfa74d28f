"""A plain Faust application for the same sessions: two tables of rocksdict with their changelogs, one event a message.

    python -m benchmarks.peers.faust_table --bootstrap HOST:PORT --topic raw --out sessions --state DIR --events N [--tuned]

Started by `benchmarks/kafka.py`. Prints one JSON line once N events are processed. Default: JSON values and the
library's settings. Tuned: uvloop, msgpack values of our own, a block cache of 64 MiB, larger buffers, linger and lz4.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.peers.rules import User, apply, decode


def application(options: argparse.Namespace) -> Any:
    """The app: one agent that reads `topic`, keeps two tables, and sends sessions to `out`."""
    if options.tuned:
        import mode.loop

        mode.loop.use("uvloop")
    import faust
    from faust.transport.producer import ProducerBuffer

    if options.tuned:
        ProducerBuffer.max_messages = 5_000
    settings: dict[str, Any] = (
        {"producer_linger": 0.02, "producer_max_batch_size": 1 << 18, "producer_compression_type": "lz4",
         "stream_buffer_maxsize": 16_384, "consumer_max_fetch_size": 4 << 20, "broker_max_poll_records": 2_000}
        if options.tuned else {}
    )
    app = faust.App(
        options.name, broker=f"kafka://{options.bootstrap}", store="rocksdb://", datadir=str(options.state),
        topic_partitions=options.partitions, topic_replication_factor=1, web_enabled=False, topic_disable_leader=True,
        consumer_auto_offset_reset="earliest", producer_max_request_size=2 << 20, **settings,
    )
    storage: dict[str, Any] = {"driver": "rocksdict"}
    types: dict[str, Any] = {}
    if options.tuned:
        storage |= {"block_cache_size": 64 << 20, "write_buffer_size": 16 << 20}
        types = {"key_type": bytes, "value_type": bytes}
    source = app.topic(options.topic, key_type=bytes, value_type=bytes, value_serializer="raw", key_serializer="raw")
    target = app.topic(options.out, key_type=bytes, value_type=bytes, value_serializer="raw", key_serializer="raw")
    users = app.Table("users", partitions=options.partitions, options=dict(storage), **types)
    bases = app.Table("bases", partitions=options.partitions, options=dict(storage), **types)
    if options.tuned:
        pack, load_user = msgspec.msgpack.encode, msgspec.msgpack.Decoder(User).decode
        load_base = msgspec.msgpack.Decoder(dict[str, int]).decode
    else:
        pack = msgspec.to_builtins
        load_base = dict

        def load_user(value: Any) -> User:
            return msgspec.convert(value, User)

    @app.agent(source)
    async def work(stream: Any) -> None:
        seen, began = 0, 0.0
        async for raw in stream:
            if not seen:
                began = time.monotonic()
            user_id, event = decode(raw)
            key: Any = user_id.encode() if options.tuned else user_id
            stored = users.get(key)
            user = load_user(stored) if stored else User()
            result = apply(user_id, user, event, lambda key=key: load_base(bases.get(key) or empty))
            users[key] = pack(user)
            if result.base is not None:
                bases[key] = pack(result.base)
            if result.session is not None:
                await target.send(key=user_id.encode(), value=result.session)
            seen += 1
            if seen == options.events:
                await app.producer.flush()
                seconds = time.monotonic() - began
                line = {"events": seen, "seconds": seconds, "cpu": time.process_time()}
                print(json.dumps(line), file=sys.__stdout__, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)

    empty: Any = pack({})
    return app


def main() -> None:
    """Runs until N events are processed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--name", default="faust-peer")
    parser.add_argument("--tuned", action="store_true")
    options = parser.parse_args()
    app = application(options)
    import faust

    faust.Worker(app, loglevel="WARNING").execute_from_commandline()


if __name__ == "__main__":
    main()
