"""The continuous trainer: read a batch from the log, score it, learn it, and now and then write a checkpoint.

A step learns the batch's high-quality sessions by NTP and what preference pairs there are (paper eq. 4, 10; Algorithm 2
line 13), then all of its sessions with the reward model (eq. 7).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from onerec.config import Config
from onerec.errors import UserError
from onerec.files import sha256_of
from onerec.versions import code_version
from streaming.semantics import SessionConfig
from streaming.store import Reader
from trainer import preference
from trainer.baselines import CoVisitation
from trainer.checkpoint import (
    Checkpoint,
    Cursor,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from trainer.config import RewardModelConfig, TrainConfig
from trainer.data import Batch, BatchReader
from trainer.evaluate import Line, finite, mean_loss, score_baselines
from trainer.items import Catalogue, build_catalogue, load_catalogue, refresh_catalogue
from trainer.journal import Journal
from trainer.judging import Judging
from trainer.learner import Learner
from trainer.model import OneRec
from trainer.optim import resolve_precision
from trainer.pair_intake import PairIntake, preference_line
from trainer.pairs import Pair
from trainer.parallel import Leader, optimizer_of
from trainer.presets import preset
from trainer.ranks import Ranks
from trainer.reward_log import REWARDS_FILE
from trainer.run_files import RunFile
from trainer.runs import Run, locked, read_run, run_path, settled, write_run

METRICS_FILE = "metrics.jsonl"
WAIT_SECONDS = 0.5


class PairCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Records of the pair log that a run took: learnt, dropped by the sampler, and passed over by the trainer and why."""

    learnt: int
    dropped: int
    stale: int
    early: int
    other_codebook: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the trainer stands after a batch: sessions learnt, of so many in the log; `watermark` in ms.

    Of this batch alone: `event_ms`, times of the watches that it was the first to learn; `pairs`, records taken of the
    pair log; `pair_ms`, when the sessions of the pairs learnt had ended.
    """

    line: Line
    sessions: int
    log_sessions: int
    sessions_per_second: float
    watermark: int | None
    event_ms: Sequence[int]
    pairs: PairCounts
    pair_ms: Sequence[int]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a call of `train` ended with; `sessions`, `steps` and counts of the whole run, `seconds` of this call."""

    steps: int
    sessions: int
    windows: int
    skipped_steps: int
    unknown_history: int
    unknown_targets: int
    judged_windows: int
    pairs: PairCounts
    watermark: int | None
    loss: float | None
    codebook_version: str
    checkpoint: str | None
    stopped: bool
    seconds: float
    new_sessions: int
    sessions_per_second: float


def train(
    state_dir: Path,
    run_dir: Path,
    config: Config,
    *,
    follow: bool = False,
    explicit: Collection[str] = (),
    stopped: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[Progress], None] = lambda progress: None,
    saved: Callable[[Checkpoint], None] = lambda checkpoint: None,
    ready: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> Result:
    """Learn the log's high-quality sessions from where the run stands; with `follow` until `stopped()`.

    `explicit`: settings, as `train.preset`, that the user gave himself: a run that was begun with others refuses them. The
    catalogue is built where there is none. Same log, journal, pairs and settings: same weights, byte for byte, wherever
    the process was killed between (CPU). Preference pairs are taken from RUN/pairs as a sampler writes them; the trainer
    never waits for one. `saved` is given the checkpoint that the run goes on from, then each one written; `ready`
    is called once, when the first batch can be read. Raises UserError, Failure as the parts do.
    """
    ranks = ranks or Ranks(device="cuda" if torch.cuda.is_available() else "cpu")
    leader = Leader(ranks)
    with locked(run_dir), Reader(state_dir) as reader:
        run = read_run(run_dir)
        if run is None:
            preset(config.train.preset)
            preference.check(config.preference)
            if not _wait_for_sessions(reader, follow, stopped, say, leader):
                raise UserError(_no_sessions(reader, state_dir))
            run = _begin(state_dir, run_dir, reader, config, say, ranks.device)
        run = settled(run, run_dir, state_dir, config, explicit)
        return _Trainer(state_dir, run_dir, run, reader, say, ranks, leader, saved).run(follow, stopped, progress, ready)


def _begin(
    state_dir: Path, run_dir: Path, reader: Reader, config: Config, say: Callable[[str], None], device: str
) -> Run:
    """Settle what a new run is made of, building the catalogue where there is none."""
    settings, semantics = config.train, reader.semantics()
    try:
        catalogue = load_catalogue(state_dir)
    except UserError:
        if (state_dir / "catalogue").exists():
            raise
        say("no catalogue yet: building semantic IDs (onerec items shows their quality)")
        catalogue = build_catalogue(state_dir, reader, config, progress=say)
    model = preset(
        settings.preset,
        levels=catalogue.levels,
        codes=catalogue.codes,
        session_items=settings.session_items or semantics.session.target_items,
        history_length=semantics.history.length,
        history_tokens=settings.history_tokens,
    )
    run = Run(
        state=str(state_dir.resolve()),
        codebook_version=catalogue.version,
        model=model,
        config=settings,
        precision=resolve_precision(settings.precision, device),
        reward=config.reward,
        reward_model=RewardModelConfig(levels=model.levels, codes=model.codes, session_items=model.session_items)
        if config.reward.train
        else None,
        preference=config.preference,
        backlog=_backlog(reader, settings),
    )
    write_run(run_dir, run)
    return run


def _backlog(reader: Reader, settings: TrainConfig) -> int:
    """The last sequence of the sessions that are learnt several times; sessions are in order of their end."""
    if settings.backlog_passes == 1:
        return 0
    if settings.backlog_until_ms is None:
        return reader.last_sequence()
    last = 0
    for sequence, session in reader.sessions():
        if session.end >= settings.backlog_until_ms:
            break
        last = sequence
    if not last:
        raise UserError(
            f"train.backlog_until_ms={settings.backlog_until_ms}: no session ended before; give a later time in ms"
        )
    return last


def _wait_for_sessions(
    reader: Reader, follow: bool, stopped: Callable[[], bool], say: Callable[[str], None], leader: Leader
) -> bool:
    """Whether the log holds a high-quality session; with `follow` waits for one."""
    waiting = False
    while not reader.counters().high_quality:
        if not follow or stopped():
            return False
        if not waiting:
            say("waiting for the first high-quality session")
        waiting = True
        leader.wait()
        time.sleep(WAIT_SECONDS)
        reader.refresh()
    return True


def _no_sessions(reader: Reader, state_dir: Path) -> str:
    """Why there is nothing to learn, with counts, and which threshold keeps most sessions out."""
    semantics: SessionConfig = reader.semantics().session
    total = reader.counters().sessions
    if not total:
        return f"state {state_dir} holds no session yet; replay more events, or end the replay with --flush"
    failing: Counter[str] = Counter()
    for _, session in reader.sessions():
        failing["min_watched"] += session.watched < semantics.min_watched
        failing["min_total_watch_ms"] += session.total_watch_ms < semantics.min_total_watch_ms
        failing["min_interactions"] += session.interactions < semantics.min_interactions
    worst = max(failing, key=lambda name: failing[name])
    counts = ", ".join(f"{count:,} below session.{name}={getattr(semantics, name)}" for name, count in failing.items())
    return (
        f"state {state_dir}: none of its {total:,} sessions is of high quality ({counts}); lower session.{worst} "
        f"first (0 switches it off), or raise session.gap_ms, and replay into a new state: "
        f"onerec replay … --state NEW --set session.{worst}=0"
    )


class _Trainer:
    """One process' share of a run: restored from the newest sound checkpoint, then driven batch by batch."""

    def __init__(
        self, state_dir: Path, run_dir: Path, run: Run, reader: Reader, say: Callable[[str], None], ranks: Ranks,
        leader: Leader, saved: Callable[[Checkpoint], None],
    ) -> None:
        self._saved = saved
        self._state_dir, self._run_dir, self._reader, self._say = state_dir, run_dir, reader, say
        self._run, self._settings = run, run.config
        settings = run.config
        self._device, self._leader = ranks.device, leader
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self._catalogue = self._load_catalogue()
        checkpoint = self._checkpoint = self._newest()
        self._model = OneRec(run.model).to(self._device)
        if checkpoint is not None:
            self._model.load_state_dict(load_weights(checkpoint))
        leader.begin(run, checkpoint)
        self._optimizer = optimizer_of(run, self._model, ranks)
        self._learner = Learner(run, ranks, self._model, self._optimizer)
        self._baseline = CoVisitation()
        self._metrics = RunFile(run_dir / METRICS_FILE, checkpoint.metrics_bytes if checkpoint else 0, say)
        self._rewards = RunFile(run_dir / REWARDS_FILE, checkpoint.rewards_bytes if checkpoint else 0, say)
        self._judging = Judging(run, self._catalogue, checkpoint, self._rewards, self._device)
        if checkpoint is not None:
            self._restore(checkpoint)
        self._counters: Counter[str] = Counter(checkpoint.counters if checkpoint else {})
        self._version = checkpoint.version if checkpoint else 0
        self._code_version, self._config_sha256 = code_version(), sha256_of(run_path(run_dir))
        self._journal = Journal(run_dir / "journal.jsonl")
        self._pairs = PairIntake(run_dir, run, self._journal, self._counters, checkpoint.pairs if checkpoint else 0)
        self._recent: list[Line] = []
        if checkpoint is not None:
            saved(checkpoint)
        self._saved_at = time.monotonic()
        self._spent_ms = self._counters["cpu_ms"] - int(1000 * time.process_time())

    def run(
        self, follow: bool, stopped: Callable[[], bool], progress: Callable[[Progress], None], ready: Callable[[], None]
    ) -> Result:
        """Learn until the log ends, or without end; a checkpoint every so often and at the end."""
        settings, checkpoint = self._settings, self._checkpoint
        step = saved = checkpoint.step if checkpoint else 0
        cursor = checkpoint.cursor if checkpoint else Cursor()
        place = (checkpoint.watermark, checkpoint.items) if checkpoint else (None, 0)
        new_sessions = since = 0

        def rest(seconds: float) -> None:
            # An idle log must not keep what was learnt from being published.
            nonlocal saved, since
            if step > saved and time.monotonic() - self._saved_at >= settings.checkpoint_seconds:
                self._save(step, cursor, *place)
                saved, since = step, 0
            self._leader.wait()
            time.sleep(seconds)

        batches = BatchReader(
            self._reader,
            self._journal,
            self._refresh_items,
            cursor=cursor,
            known=place[1],
            m=self._run.model.session_items,
            n=self._run.model.history_length,
            batch_windows=settings.batch_windows,
            idle_seconds=settings.idle_seconds,
            gap_ms=self._reader.semantics().session.gap_ms,
            swt_cap_ms=self._reader.semantics().session.swt_cap_ms,
            judge_history=self._run.reward_model.history_length if self._run.reward_model else 0,
            watermark=place[0],
            backlog=self._run.backlog,
            rounds=settings.backlog_passes,
            follow=follow,
            stopped=stopped,
            sleep=rest,
        )
        began = time.monotonic()
        ready()
        while not stopped():
            batch = batches.next(step + 1)
            if batch is None:
                break
            step, cursor = step + 1, batch.cursor
            before = self._pair_counts()
            line, pairs = self._learn(step, batch, batches.known)
            sessions = len({example.session_id for example in batch.examples})
            new_sessions, since = new_sessions + sessions, since + sessions
            place = batches.watermark(), batches.known
            waited = time.monotonic() - self._saved_at
            if since >= settings.checkpoint_sessions or waited >= settings.checkpoint_seconds:
                self._save(step, cursor, *place)
                saved, since = step, 0
            progress(
                Progress(
                    line=line,
                    sessions=self._counters["sessions"],
                    log_sessions=self._reader.counters().high_quality,
                    sessions_per_second=new_sessions / max(1e-9, time.monotonic() - began),
                    watermark=place[0],
                    event_ms=batch.event_ms,
                    pairs=self._pair_counts(before),
                    pair_ms=[pair.ended for pair in pairs if pair.ended is not None],
                )
            )
        seconds = time.monotonic() - began
        if step > saved:
            self._save(step, cursor, batches.watermark(), place[1])
        self._leader.end()
        self._metrics.close()
        self._rewards.close()
        self._journal.close()
        return Result(
            steps=step,
            sessions=self._counters["sessions"],
            windows=self._counters["windows"],
            skipped_steps=self._optimizer.skipped,
            unknown_history=self._counters["unknown_history"],
            unknown_targets=self._counters["unknown_targets"],
            judged_windows=self._counters["judged_windows"],
            pairs=self._pair_counts(),
            watermark=self._checkpoint.watermark if self._checkpoint else None,
            loss=mean_loss(self._recent) if self._recent else self._checkpoint.score if self._checkpoint else None,
            codebook_version=self._run.codebook_version,
            checkpoint=str(self._checkpoint.path) if self._checkpoint else None,
            stopped=stopped(),
            seconds=seconds,
            new_sessions=new_sessions,
            sessions_per_second=new_sessions / seconds if new_sessions else 0.0,
        )

    def _pair_counts(self, before: PairCounts | None = None) -> PairCounts:
        """Records taken of the pair log by the whole run, or since `before`."""
        names = PairCounts.__struct_fields__
        return PairCounts(
            **{name: self._counters[f"pairs_{name}"] - (getattr(before, name) if before else 0) for name in names}
        )

    def _learn(self, step: int, batch: Batch, known: int) -> tuple[Line, list[Pair]]:
        """Score the batch with the weights as they are, take one step on it and the pairs there are, and write its line."""
        pairs = self._pairs.take(step, self._version)
        self._leader.learn(step, batch, self._journal.entry(step), pairs)
        learned = self._learner.learn(batch.examples, pairs, self._catalogue.item_codes, known)
        stats, scores = learned.stats, {}
        if learned.scored:
            baselines = score_baselines(
                learned.scored, self._baseline.popularity, self._baseline, m=self._run.model.session_items
            )
            scores = {"onerec": learned.scores, **baselines}
        for example in batch.examples:
            if example.fresh:
                self._baseline.observe(example.history.tolist(), example.targets.tolist())
        self._counters.update(batch.counts)
        reward_loss, judged = self._judging.learn(step, batch.judged, self._catalogue.item_codes)
        self._counters["judged_windows"] += judged
        load = stats["expert_load"].float() * self._run.model.experts
        line = Line(
            step=step,
            round=batch.last.round,
            sequence=batch.last.sequence,
            ts=max(example.ts for example in batch.examples),
            sessions=len({example.session_id for example in batch.examples}),
            windows=len(batch.examples),
            codes=int(stats["tokens"]),
            loss=finite(stats["ntp"]),
            gradient=finite(stats["grad_norm"]),
            applied=not stats["skipped"],
            expert_load=(round(float(load.min()), 4), round(float(load.max()), 4)),
            scored=len(learned.scored),
            scores=scores,
            preference=preference_line(pairs, stats["preference"], self._version) if pairs else None,
            reward_loss=reward_loss,
        )
        self._recent.append(line)
        self._metrics.append(msgspec.json.encode(line) + b"\n")
        return line, pairs

    def _save(self, step: int, cursor: Cursor, watermark: int | None, known: int) -> None:
        """Write a checkpoint of the place after batch `step`, with the watermark and the items known then.

        The metrics so far are on the disk before it.
        """
        self._leader.save()
        self._metrics.sync()
        self._rewards.sync()
        self._counters["cpu_ms"] = self._spent_ms + int(1000 * time.process_time())
        state: dict[str, Any] = {
            "optimizer": self._optimizer.state_dict(),
            "reward": self._judging.state(),
            "rng": torch.get_rng_state(),
            "baseline": {name: torch.from_numpy(array) for name, array in self._baseline.state().items()},
        }
        self._checkpoint = save_checkpoint(
            self._run_dir,
            Checkpoint(
                step=step,
                cursor=cursor,
                watermark=watermark,
                codebook_version=self._run.codebook_version,
                items=known,
                model_config=self._run.model,
                session_items=self._run.model.session_items,
                metrics_bytes=self._metrics.size,
                score=mean_loss(self._recent),
                counters=dict(self._counters),
                created_ms=time.time_ns() // 1_000_000,
                version=self._version + 1,
                pairs=self._pairs.taken,
                rewards_bytes=self._rewards.size,
                reward_config=self._run.reward_model,
                source=self._reader.positions(),
                code_version=self._code_version,
                config_sha256=self._config_sha256,
            ),
            self._model.state_dict(),
            state,
            self._judging.weights(),
        )
        self._version += 1
        self._recent = []
        self._saved_at = time.monotonic()
        prune_checkpoints(self._run_dir, self._settings.keep_checkpoints)
        self._saved(self._checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = load_optimizer(checkpoint)
        self._optimizer.load_state_dict(state["optimizer"])
        self._judging.restore(state["reward"])
        torch.set_rng_state(state["rng"])
        self._baseline.restore({name: tensor.numpy() for name, tensor in state["baseline"].items()})
        self._say(f"going on from step {checkpoint.step:,}, session {checkpoint.cursor.sequence:,} of the log")

    def _newest(self) -> Checkpoint | None:
        checkpoint, faults = newest_checkpoint(self._run_dir)
        for fault in faults:
            self._say(f"passed over: {fault}")
        if faults:
            self._say(f"going on from {checkpoint.path if checkpoint else 'the beginning'} instead")
        return checkpoint

    def _load_catalogue(self) -> Catalogue:
        """The state's catalogue, which must be of the codebook whose codes the run has learnt."""
        catalogue = load_catalogue(self._state_dir)
        if catalogue.version != self._run.codebook_version:
            raise UserError(
                f"{self._run_dir} has learnt the semantic IDs of codebook {self._run.codebook_version}, the state "
                f"{self._state_dir} now has {catalogue.version}: their codes mean other items; give another --run"
            )
        return catalogue

    def _refresh_items(self) -> Catalogue:
        self._catalogue = refresh_catalogue(self._state_dir, self._reader, self._catalogue)
        return self._catalogue
