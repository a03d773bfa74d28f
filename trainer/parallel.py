"""One run learnt by several ranks: rank 0 decides and tells, the others follow.

Where a batch ends, which items are known, which preference pairs are used and when a checkpoint is due: rank 0 alone
decides that and writes journal, metrics and checkpoints. The others read the same session log and make the same batches
from it, as a trainer that starts again does from its journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from onerec.errors import Failure
from streaming.store import Reader
from trainer.checkpoint import (
    Checkpoint,
    Cursor,
    checkpoint_folder,
    load_checkpoint,
    load_optimizer,
    load_weights,
)
from trainer.data import Batch, BatchReader
from trainer.items import Catalogue, load_catalogue, refresh_catalogue
from trainer.journal import Entry
from trainer.learner import Learner
from trainer.model import OneRec
from trainer.optim import Optimizer
from trainer.pairs import Pair
from trainer.ranks import Ranks
from trainer.runs import Run

WAIT_SECONDS = 5.0
"""How often an idle leader says that it is alive."""


class Told(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What rank 0 has decided about the next step; the other ranks do it and nothing else."""


class Begin(Told, frozen=True, kw_only=True):
    """The run, and the step of the checkpoint to go on from; None: from the beginning."""

    run: Run
    step: int | None


class Wait(Told, frozen=True, kw_only=True):
    """Nothing to learn yet; said now and then, so that nobody takes an idle leader for a dead one."""


class Save(Told, frozen=True, kw_only=True):
    """A checkpoint is due: `Optimizer.state_dict()`, which all ranks give together."""


class End(Told, frozen=True, kw_only=True):
    """The run ends here."""


class Learn(Told, frozen=True, kw_only=True):
    """Learn batch `step`, of which the journal has `entry`, with `pairs`; the batch must end at `round`, `sequence`."""

    step: int
    entry: Entry
    round: int
    sequence: int
    pairs: tuple[Pair, ...] = ()


Order = Begin | Wait | Save | End | Learn


class FollowedJournal:
    """For `trainer.data.BatchReader` of a rank that follows: the journal as rank 0 has told it, one step at a time."""

    def __init__(self) -> None:
        self._entry: Entry | None = None

    def tell(self, entry: Entry) -> None:
        """What the next batch is made by."""
        self._entry = entry

    def entry(self, step: int) -> Entry | None:
        """What rank 0 said of batch `step`."""
        return self._entry if self._entry is not None and self._entry.step == step else None

    def covers(self, step: int) -> bool:
        """Always: rank 0 has closed every batch that is asked for."""
        return True

    def append(self, entry: Entry) -> None:
        """What follows from rank 0's word needs no writing."""


class Leader:
    """Rank 0's voice; alone it speaks to nobody."""

    def __init__(self, ranks: Ranks, clock: Callable[[], float] = time.monotonic) -> None:
        self._ranks, self._clock = ranks, clock
        self._spoke = clock()

    def begin(self, run: Run, checkpoint: Checkpoint | None) -> None:
        """Let all others build what this rank builds next: model, optimiser, their state."""
        self._tell(Begin(run=run, step=checkpoint.step if checkpoint else None))

    def wait(self) -> None:
        """Say, at most every `WAIT_SECONDS`, that there is nothing to do yet."""
        if self._clock() - self._spoke >= WAIT_SECONDS:
            self._tell(Wait())

    def learn(self, step: int, batch: Batch, entry: Entry | None, pairs: Sequence[Pair]) -> None:
        """Let all learn batch `step`, of which the journal has `entry`; `Learner.learn` must follow."""
        self._tell(
            Learn(
                step=step,
                entry=entry or Entry(step=step),
                round=batch.cursor.round,
                sequence=batch.cursor.sequence,
                pairs=tuple(pairs),
            )
        )

    def save(self) -> None:
        """Let all give their share of the optimiser's state; `Optimizer.state_dict` must follow."""
        self._tell(Save())

    def end(self) -> None:
        """Let all others end."""
        self._tell(End())

    def _tell(self, order: Order) -> None:
        if self._ranks.size > 1:
            self._ranks.tell(order, Order)
            self._spoke = self._clock()


def optimizer_of(run: Run, model: OneRec, ranks: Ranks) -> Optimizer:
    """The optimiser of a run, on every rank the same way."""
    settings = run.config
    return Optimizer(
        model,
        learning_rate=settings.learning_rate,
        clip_norm=settings.clip_norm,
        precision="bf16" if run.precision == "bf16" else "fp32",
        ranks=ranks,
        shard=settings.shard_optimizer,
    )


def follow(state_dir: Path, run_dir: Path, ranks: Ranks) -> None:
    """Do what rank 0 says until it ends the run; for every rank but the first.

    Raises Failure where rank 0 is gone, or where the log here is not the one that it reads.
    """
    with Reader(state_dir) as reader:
        follower: _Follower | None = None
        while True:
            order: Order = ranks.tell(None, Order)
            match order:
                case Begin():
                    follower = _Follower(state_dir, run_dir, reader, ranks, order)
                case Learn() if follower is not None:
                    follower.learn(order)
                case Save() if follower is not None:
                    follower.optimizer.state_dict()
                case End():
                    return
                case Wait():
                    pass


class _Follower:
    """A run as a rank other than the first has it."""

    def __init__(self, state_dir: Path, run_dir: Path, reader: Reader, ranks: Ranks, begin: Begin) -> None:
        run = begin.run
        torch.set_num_threads(run.config.threads)
        checkpoint = load_checkpoint(checkpoint_folder(run_dir, begin.step)) if begin.step is not None else None
        self._state_dir, self._reader, self._ranks = state_dir, reader, ranks
        self._catalogue = load_catalogue(state_dir)
        model = OneRec(run.model).to(ranks.device)
        if checkpoint is not None:
            model.load_state_dict(load_weights(checkpoint))
        self.optimizer = optimizer_of(run, model, ranks)
        if checkpoint is not None:
            self.optimizer.load_state_dict(load_optimizer(checkpoint)["optimizer"])
        self._learner = Learner(run, ranks, model, self.optimizer)
        self._journal = FollowedJournal()
        self._batches = BatchReader(
            reader,
            self._journal,
            self._refresh_items,
            cursor=checkpoint.cursor if checkpoint else Cursor(),
            known=checkpoint.items if checkpoint else 0,
            m=run.model.session_items,
            n=run.model.history_length,
            batch_windows=run.config.batch_windows,
            idle_seconds=run.config.idle_seconds,
            gap_ms=reader.semantics().session.gap_ms,
            backlog=run.backlog,
            rounds=run.config.backlog_passes,
        )

    def learn(self, order: Learn) -> None:
        """The batch that rank 0 has closed, read here too, and this rank's share of it."""
        self._journal.tell(order.entry)
        batch = self._batches.next(order.step)
        if batch is None or batch.cursor != Cursor(round=order.round, sequence=order.sequence):
            raise Failure(
                f"rank {self._ranks.rank}: batch {order.step} ends at {batch and batch.cursor} in the log of "
                f"{self._state_dir}, for rank 0 at session {order.sequence}; all ranks must read the same state"
            )
        self._learner.learn(batch.examples, order.pairs, self._catalogue.item_codes, self._batches.known)

    def _refresh_items(self) -> Catalogue:
        self._catalogue = refresh_catalogue(self._state_dir, self._reader, self._catalogue)
        return self._catalogue
