"""Publishing without end: a version for every newer checkpoint, one that only brings items in between, faults outlived."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import msgspec

from exporter.client import Client
from exporter.publisher import Outcome, Publisher
from exporter.release import HeldBack, OnHold
from onerec.errors import OneRecError

POLL_SECONDS = 0.2
FIRST_BACKOFF = 1.0
LONGEST_BACKOFF = 30.0


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """Something that keeps the publisher from its work: `waiting` for what will come, `hold`, or a `fault` to mend."""

    kind: Literal["waiting", "hold", "fault"]
    text: str


class Follower:
    """Drives a publisher until `stopped()`. Nothing that goes wrong ends it: it is said once and tried again.

    Args:
        publisher: makes the versions.
        server: Triton's gRPC address, waited for; None = only the repository is written.
        every_s: least seconds between the beginnings of two versions of checkpoints.
        items_every_s: least seconds between two looks for new items.
        tell: called with what became of each candidate.
        complain: called once for each new trouble, with None when it is over.
        stopped: whether to end.
        clock, sleep: monotonic seconds.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        server: str | None,
        every_s: float,
        items_every_s: float,
        tell: Callable[[Outcome], None],
        complain: Callable[[Trouble | None], None],
        stopped: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._publisher, self._server = publisher, server
        self._every, self._items_every = every_s, items_every_s
        self._tell, self._complain, self._stopped = tell, complain, stopped
        self._clock, self._sleep = clock, sleep
        self._trouble: Trouble | None = None
        self._backoff = FIRST_BACKOFF
        self._due = self._items_due = clock()
        self._settled: int | None = None
        """Newest step that needs no version any more: published, held back, or damaged and passed over."""

    def run(self, each: Callable[[], None] = lambda: None) -> None:
        """Until stopped; `each` is called between two looks."""
        while not self._stopped():
            try:
                with self._publisher.alone():
                    self._over()
                    self._settled = self._publisher.settled_step()
                    while not self._stopped():
                        self._rest(self._look(), each)
            except OneRecError as error:  # another publisher, or a repository that cannot be written
                self._say(Trouble(kind="fault", text=str(error)))
                self._rest(FIRST_BACKOFF, each)

    def _look(self) -> float:
        """One look: publishes at most one version; returns the seconds to rest at most."""
        try:
            self._publish_what_is_new()
        except HeldBack as held:
            self._settled = held.manifest.step
            self._over()
            self._tell(
                Outcome(
                    kind="held", version=held.manifest.version, items_only=False, manifest=held.manifest, seconds={},
                    reason=held.reason, scores=held.scores,
                )  # fmt: skip
            )
        except OnHold as error:
            self._say(Trouble(kind="hold", text=str(error)))
            return 1.0
        except (OneRecError, OSError) as error:
            self._say(Trouble(kind="fault", text=str(error)))
            self._backoff, wait = min(2 * self._backoff, LONGEST_BACKOFF), self._backoff
            return wait
        return POLL_SECONDS

    def _publish_what_is_new(self) -> None:
        now = self._clock()
        step = self._publisher.newest_step()
        if step is None:
            self._say(Trouble(kind="waiting", text=f"waiting for the first checkpoint in {self._publisher.export.run_dir}"))
            return
        newer = step != self._settled and now >= self._due
        items = not newer and now >= self._items_due
        if not (newer or items):
            return
        if self._server is not None and not self._answers(self._server):
            self._say(Trouble(kind="waiting", text=f"waiting for Triton at {self._server}"))
            return
        if newer:
            self._due = now + self._every
            outcome: Outcome | None = self._publisher.publish(step)
            self._settled = step
        else:
            self._items_due = now + self._items_every
            outcome = self._publisher.publish_items()
        self._over()
        if outcome is not None:
            # A version of a checkpoint brings the newest items along.
            self._items_due = now + self._items_every
            self._tell(outcome)

    @staticmethod
    def _answers(server: str) -> bool:
        # A new connection: gRPC lets one that has failed for long rest for minutes.
        with Client(server, timeout=2.0) as client:
            return client.alive()

    def _say(self, trouble: Trouble) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            self._complain(trouble)

    def _over(self) -> None:
        self._backoff = FIRST_BACKOFF
        if self._trouble is not None:
            self._trouble = None
            self._complain(None)

    def _rest(self, seconds: float, each: Callable[[], None]) -> None:
        until, step = self._clock() + seconds, self._publisher.newest_step()
        while not self._stopped() and (left := until - self._clock()) > 0:
            self._sleep(min(left, POLL_SECONDS))
            each()
            if self._publisher.newest_step() != step:
                break  # what comes may be sound where the one before was not
