"""What the sample server costs and gives: throughput, share of the compute, staleness (paper §5.3.1); RUN/pairs/stats.json."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from onerec.errors import Failure
from trainer.checkpoint import Checkpoint
from trainer.pairs import Pair, PairIndex, Record

WRITE_SECONDS = 2.0


class Stats(msgspec.Struct, kw_only=True):
    """Where the sampler stands. `records`, `pairs`, `drops` are of the whole pair log, rates and seconds of this process.

    `busy_seconds`: searching and judging; rates are a second of those. `waiting`: sampled sessions not yet taken;
    `unread`: pairs that the trainer has not taken, at most `--queue`. `snapshot_version` is M_t's, `versions_behind`
    how many checkpoints older than the newest one pairs were when the trainer took them, as far as checkpoints tell:
    at most one too many. `compute_share`: CPU seconds of all samplers of this run over those of the trainer.
    """

    records: int = 0
    pairs: int = 0
    drops: dict[str, int] = {}
    made: int = 0
    generated: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    pairs_per_second: float = 0.0
    sessions_per_second: float = 0.0
    waiting: int = 0
    unread: int = 0
    snapshot_step: int | None = None
    snapshot_version: int | None = None
    taken: int = 0
    versions_behind_mean: float | None = None
    versions_behind_max: int | None = None
    cpu_seconds: float = 0.0
    trainer_cpu_seconds: float | None = None
    compute_share: float | None = None


def stats_path(run_dir: Path, member: int = 0) -> Path:
    """RUN/pairs/stats.json; each further sampler of the run has its own, stats-1.json and so on."""
    return run_dir / "pairs" / (f"stats-{member}.json" if member else "stats.json")


def read_stats(path: Path) -> Stats | None:
    """What a sampler wrote last; None where there is nothing, or nothing legible."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Stats)
    except (OSError, msgspec.DecodeError):
        return None


class Meter:
    """Counts what a sampler does, and writes it to `path` every other second.

    `log` gives the totals and says which pairs a checkpoint has taken.
    """

    def __init__(
        self, path: Path, log: PairIndex, *,
        clock: Callable[[], float] = time.monotonic, cpu: Callable[[], float] = time.process_time,
    ) -> None:
        self._path, self._log, self._clock, self._cpu = path, log, clock, cpu
        before = read_stats(path)
        # Without what it took to start, as the trainer counts its own.
        self._cpu_before = (before.cpu_seconds if before is not None else 0.0) - cpu()
        self._stats = Stats()
        self._made_pairs = 0
        self._behind = [0, 0, 0]
        self._taken: int | None = None
        self._began, self._written = clock(), -WRITE_SECONDS

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Time in here is time spent sampling."""
        began = self._clock()
        yield
        self._stats.busy_seconds += self._clock() - began

    def made(self, records: Sequence[Record], generated: int) -> None:
        """Records just written, and the sessions generated for them."""
        stats = self._stats
        stats.made += len(records)
        stats.generated += generated
        self._made_pairs += sum(isinstance(record, Pair) for record in records)

    def moved(self, checkpoint: Checkpoint | None) -> None:
        """A newer checkpoint is M_t; the pairs that it took since the one before were taken under that one's version."""
        if checkpoint is None:
            return
        stats = self._stats
        stats.snapshot_step, stats.snapshot_version = checkpoint.step, checkpoint.version
        cpu_ms = checkpoint.counters.get("cpu_ms")
        stats.trainer_cpu_seconds = None if cpu_ms is None else cpu_ms / 1000
        if self._taken is not None:
            for version in self._log.pairs_between(self._taken, checkpoint.pairs):
                behind = max(0, checkpoint.version - 1 - version)
                self._behind = [self._behind[0] + 1, self._behind[1] + behind, max(self._behind[2], behind)]
        self._taken = checkpoint.pairs

    def waits(self, *, unread: int, waiting: int) -> None:
        """What is before and behind the sampler."""
        self._stats.unread, self._stats.waiting = unread, waiting

    def stats(self) -> Stats:
        """The figures now; written to the file now and then."""
        stats = self._stats
        stats.records, stats.pairs, stats.drops = self._log.last, len(self._log.pairs), dict(self._log.drops)
        stats.seconds = self._clock() - self._began
        if stats.busy_seconds:
            stats.pairs_per_second = self._made_pairs / stats.busy_seconds
            stats.sessions_per_second = stats.generated / stats.busy_seconds
        stats.cpu_seconds = self._cpu_before + self._cpu()
        if stats.trainer_cpu_seconds:
            stats.compute_share = stats.cpu_seconds / stats.trainer_cpu_seconds
        count, total, most = self._behind
        stats.taken = count
        if count:
            stats.versions_behind_mean, stats.versions_behind_max = total / count, most
        if self._clock() - self._written >= WRITE_SECONDS:
            self.write()
        return stats

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self._written = self._clock()
        self.stats()
        staging = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            staging.write_bytes(msgspec.json.format(msgspec.json.encode(self._stats)) + b"\n")
            staging.replace(self._path)
        except OSError as error:
            raise Failure(f"{self._path} cannot be written: {error.strerror}; free space and start again") from error
