"""Which preference pairs a step of the trainer learns: from the pair log as they come, or from the journal in a replay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onerec.errors import UserError
from trainer.evaluate import PreferenceLine, finite
from trainer.journal import Entry, Journal
from trainer.pairs import Pair, PairReader, Record, pairs_path
from trainer.runs import Run

READ_AHEAD = 8
"""Records looked at for each pair that a step may learn: more than that of drops and stale ones wait for the next step."""


class PairIntake:
    """Takes the records of RUN/pairs/pairs.log in order, each once; never waits for one.

    Passed over and counted in `counters`: what the sampler dropped (`pairs_dropped`), pairs of a snapshot more than
    `preference.max_age` versions old (`pairs_stale`), from before the generator had learnt `preference.seed_sessions`
    (`pairs_early`), and of another codebook. `taken`: number of the last record taken.
    """

    def __init__(self, run_dir: Path, run: Run, journal: Journal, counters: Counter[str], taken: int) -> None:
        self.taken = taken
        self._run, self._journal, self._counters = run, journal, counters
        self._path = pairs_path(run_dir)
        self._log = PairReader(self._path)

    def take(self, step: int, version: int) -> list[Pair]:
        """The pairs that step `step` learns, in the journal before this returns; `version`: that of the newest checkpoint.

        Raises UserError where the journal names records that the log does not hold.
        """
        records, learnt = self._replayed(step) if self._journal.replays(step) else self._new(step, version)
        if not records:
            return []
        numbers = {pair.number for pair in learnt}
        self._counters["pairs_learnt"] += len(learnt)
        for record in records:
            if not isinstance(record, Pair):
                self._counters["pairs_dropped"] += 1
            elif record.number not in numbers:
                self._counters[self._reason(record, version) or "pairs_stale"] += 1
        self.taken = records[-1].number
        return learnt

    def _replayed(self, step: int) -> tuple[Sequence[Record], list[Pair]]:
        entry = self._journal.entry(step)
        if entry is None or not entry.taken:
            return [], []
        records = self._log.read(self.taken, entry.taken - self.taken)
        if not records or records[-1].number != entry.taken:
            raise UserError(
                f"{self._path} ends before record {entry.taken}, which step {step} of this run has learnt; restore the "
                "file, or start a new --run"
            )
        return records, [record for record in records if isinstance(record, Pair) and record.number in entry.pairs]

    def _new(self, step: int, version: int) -> tuple[Sequence[Record], list[Pair]]:
        most = self._run.preference.pairs_per_step
        records = self._log.read(self.taken, READ_AHEAD * most)
        learnt: list[Pair] = []
        for place, record in enumerate(records):
            if isinstance(record, Pair) and self._reason(record, version) is None:
                if len(learnt) == most:
                    records = records[:place]
                    break
                learnt.append(record)
        if records:
            numbers = tuple(pair.number for pair in learnt)
            self._journal.append(Entry(step=step, pairs=numbers, taken=records[-1].number))
        return records, learnt

    def _reason(self, pair: Pair, version: int) -> str | None:
        """Why a pair is passed over; None: it is learnt."""
        settings = self._run.preference
        if pair.codebook_version != self._run.codebook_version:
            return "pairs_other_codebook"
        if version - pair.snapshot_version > settings.max_age:
            return "pairs_stale"
        return "pairs_early" if self._counters["sessions"] < settings.seed_sessions else None


def preference_line(pairs: Sequence[Pair], stats: Mapping[str, Any], version: int) -> PreferenceLine:
    """What the metrics say of the pairs of a step; `stats` are those of `trainer.preference.loss` with its `loss`."""
    return PreferenceLine(
        pairs=len(pairs),
        loss=finite(stats["loss"]),
        margin=finite(stats["margin"]),
        accuracy=finite(stats["accuracy"]),
        age=version - min(pair.snapshot_version for pair in pairs),
    )
