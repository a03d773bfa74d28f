"""The preference sample server (paper §4; Algorithm 2): a process of its own that turns sampled sessions into pairs.

It follows the run's checkpoints, takes the sampled sessions that M_t has learnt in the order of the log, and writes one
record each to the pair log. Its place is the last record there, so a kill at any moment loses and repeats nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import torch

from onerec.closing import Closing
from onerec.config import Config
from onerec.errors import Failure, UserError
from streaming.store import Reader
from trainer.checkpoint import Checkpoint, checkpoint_steps, load_model, load_reward_model, newest_checkpoint
from trainer.data import known_rows
from trainer.items import Catalogue, load_catalogue
from trainer.pairs import Drop, PairLog, Record, is_sampled, pairs_path
from trainer.runs import read_run
from trainer.sampler_stats import Meter, Stats, stats_path
from trainer.sampling import PairMaker, Request

BATCH = 8
"""Requests a beam search: enough for a core, and little to lose to a kill."""
POLL_SECONDS = 0.25
SCAN = 20_000
"""Sessions read at a stretch before something else gets its turn."""

Say = Callable[[str], None]
Wrote = Callable[[Sequence[Record]], None]


class Waiting(NamedTuple):
    """A sampled session whose turn has not come; `end` is its event time, ms."""

    session_id: str
    sequence: int
    history: list[str]
    end: int


class Snapshots:
    """M_t: the newest sound checkpoint that has a reward model and has seen `preference.seed_sessions`.

    The newest, because the log-probabilities of a pair are the reference of its loss (eq. 10): the younger M_t, the closer
    is the reference to the policy that learns from it. Raises UserError where run and state do not belong together.
    """

    def __init__(self, state_dir: Path, run_dir: Path, config: Config, say: Say) -> None:
        self.checkpoint: Checkpoint | None = None
        self.maker: PairMaker | None = None
        self._state_dir, self._run_dir, self._config, self._say = state_dir, run_dir, config, say
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._catalogue: Catalogue | None = None
        self._tried = -1
        self._told: set[str] = set()

    def look(self) -> bool:
        """Move to the newest checkpoint; whether it is another one than before."""
        steps = checkpoint_steps(self._run_dir)
        if not steps or steps[-1] == self._tried:
            return False
        self._tried = steps[-1]
        found, faults = newest_checkpoint(self._run_dir)
        for fault in faults:
            self._tell(f"passed over: {fault}")
        if found is None or (self.checkpoint is not None and found.step <= self.checkpoint.step):
            return False
        sessions = found.counters.get("sessions", 0)
        if sessions < self._config.preference.seed_sessions:
            self._tell(f"waiting for a seed model: {self._config.preference.seed_sessions:,} sessions learnt")
            return False
        try:
            maker = self._make(found)
        except OSError as error:
            # Pruned between looking and loading: there is a newer one then.
            self._tell(f"checkpoint of step {found.step:,} is gone ({error.strerror or error}); looking again")
            self._tried = -1
            return False
        if maker is None:
            self._tell(
                f"checkpoint of step {found.step:,} holds no reward model; waiting for one that does "
                "(a run begun with reward.train=false never will)"
            )
            return False
        self.checkpoint, self.maker = found, maker
        return True

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)

    def _make(self, checkpoint: Checkpoint) -> PairMaker | None:
        reward_model = load_reward_model(checkpoint)
        if reward_model is None:
            return None
        if self._catalogue is None or len(self._catalogue.item_codes) < checkpoint.items:
            self._catalogue = load_catalogue(self._state_dir)
        if self._catalogue.version != checkpoint.codebook_version:
            raise UserError(
                f"{self._run_dir} has learnt the semantic IDs of codebook {checkpoint.codebook_version}, the state "
                f"{self._state_dir} now has {self._catalogue.version}: their codes mean other items; sample with the state "
                "and the run that belong together"
            )
        if len(self._catalogue.item_codes) < checkpoint.items:
            raise UserError(
                f"the catalogue of {self._state_dir} has {len(self._catalogue.item_codes)} items, {self._run_dir} has learnt "
                f"with {checkpoint.items}; give the --state that the run was trained on"
            )
        preference = self._config.preference
        run = read_run(self._run_dir)
        if run is not None:
            # As many losers as the run's loss takes, whatever is asked for here: the trainer cannot mix them.
            preference = msgspec.structs.replace(preference, rejected=run.preference.rejected)
        return PairMaker(
            load_model(checkpoint).to(self._device),
            reward_model.to(self._device),
            self._catalogue.item_codes[: checkpoint.items],
            preference,
            self._config.reward,
            snapshot_step=checkpoint.step,
            snapshot_version=checkpoint.version,
            codebook_version=checkpoint.codebook_version,
            device=self._device,
        )

    def requests(self, waiting: Sequence[Waiting]) -> list[Request]:
        """What to ask M_t for these sessions; items that it does not know are left out of their histories."""
        if self._catalogue is None or self.checkpoint is None:
            raise RuntimeError("no snapshot yet")
        index, known = self._catalogue.index, self.checkpoint.items
        return [Request(w.session_id, w.sequence, known_rows(w.history, index, known)) for w in waiting]


class Source(Protocol):
    """Where sampled sessions come from and their records go to."""

    def take(self, checkpoint: Checkpoint) -> None:
        """Read on, as far as the checkpoint has learnt."""

    def due(self) -> int:
        """Sampled sessions whose turn has come."""

    def next(self, count: int) -> list[Waiting]:
        """The first of those, without taking them away."""

    def put(self, records: list[Record]) -> bool:
        """Write the records of as many of the first, which are then taken away; False: all is as it was before."""

    def unread(self, checkpoint: Checkpoint) -> int:
        """Pairs that the trainer of this checkpoint has not taken yet."""


class LogSource(Closing):
    """Sessions of a state's session log, records into the pair log of the run."""

    def __init__(self, state_dir: Path, run_dir: Path, ratio: float) -> None:
        self._run_dir, self._ratio = run_dir, ratio
        self._reader = Reader(state_dir)
        try:
            self.log = PairLog(pairs_path(run_dir))
        except BaseException:
            self._reader.close()
            raise
        self._waiting: deque[Waiting] = deque()
        self._scanned = self.log.last_sequence

    def take(self, checkpoint: Checkpoint) -> None:
        """Read the log up to the checkpoint's cursor: sessions that M_t has learnt, no later ones.

        A later one's history holds what the trainer is yet to be tested on.
        """
        end = learnt_up_to(self._run_dir, checkpoint)
        if self._scanned >= end:
            return
        self._reader.refresh()
        for count, (sequence, session) in enumerate(self._reader.sessions(after=self._scanned)):
            if sequence > end or count == SCAN:
                break
            self._scanned = sequence
            if session.high_quality and is_sampled(session.session_id, self._ratio):
                self._waiting.append(Waiting(session.session_id, sequence, session.history, session.end))

    def due(self) -> int:
        """All that were read."""
        return len(self._waiting)

    def next(self, count: int) -> list[Waiting]:
        """The oldest."""
        return [self._waiting[place] for place in range(min(count, len(self._waiting)))]

    def put(self, records: list[Record]) -> bool:
        """Append to the pair log, whose last record is the place to go on from."""
        self.log.append(records)
        for _ in records:
            self._waiting.popleft()
        return True

    def unread(self, checkpoint: Checkpoint) -> int:
        """By record number."""
        return len(self.log.pairs_between(checkpoint.pairs, self.log.last))

    def close(self) -> None:
        """Let go of both logs."""
        self._reader.close()
        self.log.close()


def learnt_up_to(run_dir: Path, checkpoint: Checkpoint) -> int:
    """The last sequence that the generator has learnt; from the second pass over the backlog on, at least all of that."""
    if checkpoint.cursor.round == 0:
        return checkpoint.cursor.sequence
    run = read_run(run_dir)
    return max(checkpoint.cursor.sequence, run.backlog if run is not None else 0)


class Sampler:
    """Drives a source with the snapshots of a run; `queue` bounds both what is unread and what waits.

    Rules. Sessions are taken in order. With `queue` pairs unread it waits for the trainer. Where more than `queue` sampled
    sessions wait, the oldest beyond are passed over, each with a record `behind`: the trainer is past them by then.
    `wrote` is given the records just written.
    """

    def __init__(
        self, source: Source, snapshots: Snapshots, meter: Meter, *, queue: int,
        sleep: Callable[[float], None] = time.sleep, wrote: Wrote = lambda records: None,
    ) -> None:
        self._source, self._snapshots, self._meter, self._queue, self._sleep = source, snapshots, meter, queue, sleep
        self._wrote = wrote

    def run(self, follow: bool, stopped: Callable[[], bool], say: Say, progress: Callable[[Stats], None]) -> Stats:
        """Sample until nothing is left to take, or with `follow` until `stopped()`."""
        told = ""

        def wait(why: str) -> None:
            nonlocal told
            if why and why != told:
                say(why)
            told = why
            progress(self._meter.stats())
            self._sleep(POLL_SECONDS)

        while not stopped():
            if self._snapshots.look():
                self._meter.moved(self._snapshots.checkpoint)
            checkpoint, maker = self._snapshots.checkpoint, self._snapshots.maker
            if checkpoint is None or maker is None:
                if not follow:
                    raise UserError("no checkpoint with a reward model yet; train first, or give --follow to wait for one")
                wait("waiting for the first checkpoint with a reward model")
                continue
            self._source.take(checkpoint)
            self._pass_over(checkpoint)
            unread, waiting = self._source.unread(checkpoint), self._source.due()
            self._meter.waits(unread=unread, waiting=waiting)
            if not waiting or unread >= self._queue:
                if not follow:
                    break
                wait("" if not waiting else f"{unread} pairs are unread (--queue {self._queue}): waiting for the trainer")
                continue
            with self._meter.busy():
                batch = self._source.next(min(BATCH, self._queue - unread))
                made, generated = maker.make_counted(self._snapshots.requests(batch))
            self._put([msgspec.structs.replace(record, ended=w.end) for record, w in zip(made, batch, strict=True)], generated)
            progress(self._meter.stats())
        self._meter.write()
        return self._meter.stats()

    def _pass_over(self, checkpoint: Checkpoint) -> None:
        late = self._source.due() - self._queue
        if late <= 0:
            return
        records: list[Record] = [
            Drop(number=0, session_id=w.session_id, sequence=w.sequence, snapshot_step=checkpoint.step, reason="behind",
                 ended=w.end)
            for w in self._source.next(late)
        ]
        self._put(records, 0)

    def _put(self, records: list[Record], generated: int) -> None:
        if self._source.put(records):
            self._meter.made(records, generated)
            self._wrote(records)


def sample(
    state_dir: Path,
    run_dir: Path,
    config: Config,
    *,
    queue: int,
    follow: bool = False,
    threads: int = 1,
    stopped: Callable[[], bool] = lambda: False,
    say: Say = lambda text: None,
    progress: Callable[[Stats], None] = lambda stats: None,
    wrote: Wrote = lambda records: None,
) -> Stats:
    """Make pairs of the session log of `state_dir` for the run `run_dir`; one sampler a run.

    Raises UserError where nothing is to be sampled, another sampler is at work, or state and run do not fit; Failure where
    the disk refuses.
    """
    torch.set_num_threads(threads)
    if not run_dir.is_dir() and not follow:
        raise UserError(f"run {run_dir}: there is none; onerec train --state {state_dir} --run {run_dir} makes it")
    check_sampling(config, run_dir)
    with LogSource(state_dir, run_dir, config.preference.ratio) as source:
        meter = Meter(stats_path(run_dir), source.log)
        sampler = Sampler(source, Snapshots(state_dir, run_dir, config, say), meter, queue=queue, wrote=wrote)
        return sampler.run(follow, stopped, say, progress)


def check_sampling(config: Config, run_dir: Path) -> None:
    """Raise UserError where nothing is to be sampled, Failure where the run's folder cannot be written."""
    if config.preference.ratio == 0:
        raise UserError("preference.ratio is 0: no session becomes a pair; set it, for example --set preference.ratio=0.01")
    try:
        pairs_path(run_dir).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"{run_dir} cannot be written: {error.strerror}; mend permissions, or give another") from error
