"""A Quix Streams application for the same sessions: its RocksDB state with changelog, one event a message.

    python -m benchmarks.peers.quix --bootstrap HOST:PORT --topic raw --out sessions --state DIR --events N [--tuned]

Started by `benchmarks/kafka.py`. Prints one JSON line once N events are processed and their checkpoint is committed. Default:
the library's JSON state. Tuned: msgpack bytes of our own as state, larger fetches. At least once, as its documentation
recommends for speed; `--exactly-once` for transactions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import msgspec
from quixstreams import Application, State

from benchmarks.peers.rules import User, apply, decode


def main() -> None:
    """Runs until N events are processed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--name", default="quix-peer")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--exactly-once", action="store_true")
    options = parser.parse_args()

    began, seen = 0.0, 0

    def processed(topic: str, partition: int, offset: int) -> None:
        nonlocal began, seen
        seen += 1
        if seen == 1:
            began = time.monotonic()
        if seen == options.events:
            app.stop()

    app = Application(
        broker_address=options.bootstrap, consumer_group=options.name, auto_offset_reset="earliest",
        state_dir=str(options.state), loglevel="WARNING", on_message_processed=processed,
        processing_guarantee="exactly-once" if options.exactly_once else "at-least-once",
        producer_extra_config={"compression.type": "lz4", "linger.ms": 20} if options.tuned else {},
        consumer_extra_config={"queued.min.messages": 100_000} if options.tuned else {},
    )
    source = app.topic(options.topic, value_deserializer="bytes", key_deserializer="str")
    target = app.topic(options.out, value_serializer="bytes", key_serializer="str")
    load_user = msgspec.msgpack.Decoder(User).decode
    load_base = msgspec.msgpack.Decoder(dict[str, int]).decode
    pack = msgspec.msgpack.encode

    def tuned(raw: bytes, state: State) -> bytes | None:
        user_id, event = decode(raw)
        stored = state.get_bytes("user")
        user = load_user(stored) if stored else User()
        result = apply(user_id, user, event, lambda: load_base(state.get_bytes("base") or b"\x80"))
        state.set_bytes("user", pack(user))
        if result.base is not None:
            state.set_bytes("base", pack(result.base))
        return result.session

    def plain(raw: bytes, state: State) -> bytes | None:
        user_id, event = decode(raw)
        user = msgspec.convert(state.get("user", [[], [], []]), User)
        result = apply(user_id, user, event, lambda: state.get("base", {}))
        state.set("user", msgspec.to_builtins(user))
        if result.base is not None:
            state.set("base", result.base)
        return result.session

    frame = app.dataframe(source)
    frame = frame.apply(tuned if options.tuned else plain, stateful=True)
    frame = frame.filter(lambda session: session is not None)
    frame.to_topic(target)
    # After `stop` it commits its checkpoint: state, changelog, sessions and offsets are written when it returns.
    app.run()
    line = {"events": options.events, "seconds": time.monotonic() - began, "cpu": time.process_time()}
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
