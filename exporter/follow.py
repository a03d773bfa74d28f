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

Work = Literal["lock", "checkpoint", "items"]
"""What a trouble keeps from being done: anything at all, versions of checkpoints, versions of items."""


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
        self._trouble: tuple[Trouble, Work] | None = None
        self._backoff = FIRST_BACKOFF
        self._due = self._items_due = self._retry = clock()
        self._failed: int | None = None
        """Step that ended by a fault, tried again from `_retry` on."""
        self._settled: int | None = None
        """Newest step that needs no version any more: published, held back, or damaged and passed over."""

    def run(self, each: Callable[[], None] = lambda: None) -> None:
        """Until stopped; `each` is called between two looks."""
        while not self._stopped():
            try:
                with self._publisher.alone():
                    self._over("lock")
                    self._settled = self._publisher.settled_step()
                    while not self._stopped():
                        self._look()
                        each()
                        self._sleep(POLL_SECONDS)
            except OneRecError as error:  # another publisher, or a repository that cannot be written
                self._say(Trouble(kind="fault", text=str(error)), "lock")
                each()
                self._sleep(FIRST_BACKOFF)

    def _look(self) -> None:
        """Publishes at most one version."""
        now, step = self._clock(), self._publisher.newest_step()
        if step is None:
            where = self._publisher.export.run_dir
            self._say(Trouble(kind="waiting", text=f"waiting for the first checkpoint in {where}"), "lock")
            self._prepare()
            return
        newer = step != self._settled and now >= (self._retry if step == self._failed else self._due)
        if not newer and now < self._items_due:
            return
        if self._server is not None and not self._answers(self._server):
            self._say(Trouble(kind="waiting", text=f"waiting for Triton at {self._server}"), "lock")
            return
        self._over("lock")
        work: Work = "checkpoint" if newer else "items"
        try:
            if newer:
                self._due = now + self._every
                outcome: Outcome | None = self._publisher.publish(step)
            else:
                self._items_due = now + self._items_every
                outcome = self._publisher.publish_items()
        except HeldBack as held:
            outcome = _held(held)
        except OnHold as error:
            self._say(Trouble(kind="hold", text=str(error)), work)
            self._failed, self._retry = step, now + FIRST_BACKOFF
            return
        except (OneRecError, OSError) as error:
            self._say(Trouble(kind="fault", text=str(error)), work)
            if newer:
                self._failed, self._retry = step, now + self._backoff
            else:
                self._items_due = now + max(self._backoff, self._items_every)
            self._backoff = min(2 * self._backoff, LONGEST_BACKOFF)
            return
        if newer:
            self._settled = step
        self._over(work)
        if outcome is not None:
            # A version of a checkpoint brings the newest items along.
            self._items_due = now + self._items_every
            self._tell(outcome)

    def _prepare(self) -> None:
        try:
            self._publisher.prepare()
        except (OneRecError, OSError):
            pass  # whatever it is, the first version will meet it and say so

    @staticmethod
    def _answers(server: str) -> bool:
        with Client(server, timeout=2.0) as client:
            return client.alive()

    def _say(self, trouble: Trouble, work: Work) -> None:
        if self._trouble is None or trouble != self._trouble[0]:
            self._trouble = trouble, work
            self._complain(trouble)

    def _over(self, work: Work) -> None:
        """The trouble of one kind of work is over; that of another may well last."""
        if self._trouble is not None and self._trouble[1] == work:
            self._trouble, self._backoff = None, FIRST_BACKOFF
            self._complain(None)


def _held(held: HeldBack) -> Outcome:
    return Outcome(
        kind="held", version=held.manifest.version, items_only=False, manifest=held.manifest, seconds={},
        reason=held.reason, scores=held.scores,
    )  # fmt: skip
