"""Runs a command of `onerec` with a trap inside: `frozen.py ACTION:STEP:K[,…] WORDS…` stops or kills the process by itself.

ACTION is `freeze` (SIGSTOP) or `kill` (SIGKILL); at the K-th time that the process is about to do STEP. Steps of the worker's
store and of `ingest` are those of `PartitionStore` and `Ingest`; steps of any transactional producer are its calls
("call:init_transactions", "call:begin_transaction", "call:send_offsets_to_transaction", "call:commit_transaction"), and
"done:…" once they have returned.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

SIGNALS = {"freeze": signal.SIGSTOP, "kill": signal.SIGKILL}


class Trap:
    """Counts steps, and springs once at each place named."""

    def __init__(self, text: str) -> None:
        self.places: dict[tuple[str, int], signal.Signals] = {}
        for part in text.split(","):
            action, _, place = part.partition(":")
            step, _, count = place.rpartition(":")
            self.places[step, int(count)] = SIGNALS[action]
        self.counts: Counter[str] = Counter()

    def __call__(self, step: str, partition: int = -1) -> None:
        self.counts[step] += 1
        number = self.places.pop((step, self.counts[step]), None)
        if number is not None:
            print(f"trap: {number.name} before {step} number {self.counts[step]} of partition {partition}", flush=True)
            os.kill(os.getpid(), number)
            print(f"trap: woken before {step}", flush=True)


def _trapped(made: Callable[..., None], trap: Trap) -> Callable[..., None]:
    """A constructor that is given the trap, whatever step hook its caller gives."""

    @functools.wraps(made)
    def make(self: object, *args: Any, **named: Any) -> None:
        made(self, *args, **{**named, "on_step": trap})

    return make


def main() -> None:
    """Sets the trap and becomes the command."""
    trap = Trap(sys.argv.pop(1))
    import confluent_kafka

    class Producer(confluent_kafka.Producer):
        def _run(self, name: str, *args: Any, **named: Any) -> Any:
            trap(f"call:{name}")
            result = getattr(super(), name)(*args, **named)
            trap(f"done:{name}")
            return result

        def init_transactions(self, *args: Any, **named: Any) -> Any:
            return self._run("init_transactions", *args, **named)

        def begin_transaction(self, *args: Any, **named: Any) -> Any:
            return self._run("begin_transaction", *args, **named)

        def send_offsets_to_transaction(self, *args: Any, **named: Any) -> Any:
            return self._run("send_offsets_to_transaction", *args, **named)

        def commit_transaction(self, *args: Any, **named: Any) -> Any:
            return self._run("commit_transaction", *args, **named)

    confluent_kafka.Producer = Producer  # type: ignore[misc]
    from streaming.kafka.ingest import Ingest
    from streaming.kafka.partitions import PartitionStore

    for kind in (PartitionStore, Ingest):
        kind.__init__ = _trapped(kind.__init__, trap)  # type: ignore[method-assign]
    from onerec.cli import main as command

    command()


if __name__ == "__main__":
    main()
