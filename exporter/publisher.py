"""One run's versions, one after another: what they have in common is kept in memory, and each passes the release gate.

Two kinds. A version of a new checkpoint: new weights beside the template's graph, checked against torch, judged by the gate.
A version that only brings new items: the served version's graph and weights as second names of the same files, a new
catalogue beside them; no torch, no search, no comparison, since nothing of the model has changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from exporter import bundle
from exporter.bundle import GateScores, Manifest
from exporter.export import Expected, Export, build_bundle, make_templates, state_of_run
from exporter.publish import publish_bundle
from exporter.release import HeldBack, check_hold, held_versions, note_first
from exporter.repository import Repository, manifest_or_none
from exporter.steps import Report, silent, timed
from exporter.triton_config import RecommendConfig
from onerec.closing import Closing
from onerec.errors import Failure, UserError
from onerec.monitor.settings import GateConfig
from onerec.versions import code_version
from trainer.checkpoint import checkpoint_steps
from trainer.config import BeamConfig, RewardConfig
from trainer.reward_weights import tower_weights
from trainer.runs import read_run

if TYPE_CHECKING:
    from exporter.gate import Gate
    from streaming.store import Reader
    from trainer.checkpoint import Checkpoint
    from trainer.items import Catalogue


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """When something happened: wall clock, and the newest event of the log at that time; epoch ms, None where not known."""

    wall_ms: int
    newest_event_ms: int | None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a candidate. `sequences`: the sessions that its weights have learnt and those of the version before
    have not, (after, up to]; None for the first version and where only items are new. `loaded`: None where no server was named.
    """

    kind: Literal["published", "held"]
    version: int
    items_only: bool
    manifest: Manifest
    seconds: dict[str, float]
    reason: str = ""
    scores: GateScores | None = None
    sequences: tuple[int, int] | None = None
    exported: Moment | None = None
    loaded: Moment | None = None


class _Steps(dict[str, float]):
    """Seconds by step, and the moments at which steps ended."""

    def __init__(self, report: Report, moment: Callable[[], Moment]) -> None:
        super().__init__()
        self.moments: dict[str, Moment] = {}
        self._report, self._moment = report, moment

    def __call__(self, step: str, seconds: float) -> None:
        self[step] = seconds
        if step in ("install", "ask"):
            self.moments[step] = self._moment()
        self._report(step, seconds)


class Publisher(Closing):
    """Makes versions of the newest checkpoint of a run (or of the one in `export.checkpoint`).

    Args:
        export: run, state and beams.
        repository: folder of the model repository; made if it is not there.
        server: host:port of Triton's gRPC end; None = versions are served from the next start on.
        config: how Triton batches; its `state` is filled in where empty.
        gate: what a candidate must pass.
        now: wall clock in seconds.
        report: called with the name and the seconds of each step.
    """

    def __init__(
        self,
        export: Export,
        repository: Path,
        *,
        server: str | None = None,
        config: RecommendConfig | None = None,
        gate: GateConfig | None = None,
        now: Callable[[], float] = time.time,
        report: Report = silent,
    ) -> None:
        tower_weights(export.reward)  # refuses weights that are all 0 before anything is built
        self.export = export
        self.place = Repository(repository)
        self._server, self._config = server, config or RecommendConfig()
        self._settings, self._now, self._report = gate or GateConfig(), now, report
        self._wanted: int | None = None
        self._prepared = False
        self._gate: Gate | None = None
        self._reader: Reader | None = None
        self._catalogue: Catalogue | None = None

    def close(self) -> None:
        """Let go of the state."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def alone(self) -> AbstractContextManager[None]:
        """Keeps other publishers away while the block lasts; Failure naming the one that is at work."""
        return self.place.publisher()

    def prepare(self) -> None:
        """Trace the graph that the run's versions will need, so that its first checkpoint is not kept waiting for it.

        Does nothing before the run was begun, and nothing twice.
        """
        if self._prepared or (run := read_run(self.export.run_dir)) is None:
            return
        self._prepared = True
        make_templates(
            run.model, run.reward_model, self.export.width, self.place.templates, self.place.tracing, report=self._report
        )

    def newest(self) -> Manifest | None:
        """The newest version in the repository."""
        versions = self.place.versions()
        return manifest_or_none(self.place.folder(versions[-1])) if versions else None

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint, damaged or not; None where there is none."""
        steps = checkpoint_steps(self.export.run_dir)
        return steps[-1] if steps else None

    def settled_step(self) -> int | None:
        """The newest step that was published, held back or rolled back here: it is not published again by itself."""
        newest = self.newest()
        steps = [newest.step] if newest else []
        steps += [held.step for held in held_versions(self.place) if held.step is not None]
        steps += [event.step for event in self.place.events() if event.event == "rolled back" and event.step is not None]
        return max(steps, default=None)

    def publish(self, step: int | None = None) -> Outcome:
        """A version of the newest sound checkpoint and the newest catalogue.

        With `step`, the one wanted, an older sound checkpoint that is served already is a Failure. Raises HeldBack where the
        gate refuses it, OnHold, UserError or Failure; then the served version is as it was.
        """
        check_hold(self.place)
        self._wanted = step
        steps = _Steps(self._report, self._moment)
        made: list[Manifest] = []
        before: Manifest | None = None

        def build(folder: Path, version: int) -> tuple[Manifest, Expected]:
            nonlocal before
            before = self.newest()
            manifest, expected = self._build(folder, version, before, steps)
            made.append(manifest)
            return manifest, expected

        version = publish_bundle(
            self.place.root, build, server=self._server, config=self._triton(), now=self._now, report=steps
        )
        return self._outcome(version, made[0], before, steps)

    def publish_items(self) -> Outcome | None:
        """A version with the served version's weights and the items that arrived since; None where none did.

        Raises OnHold, UserError or Failure; then the served version is as it was.
        """
        base = self.newest()
        if base is None:
            return None
        catalogue = self._fresh_catalogue(base.codebook_version)
        if catalogue.revision == base.catalogue_revision:
            return None
        check_hold(self.place)
        steps = _Steps(self._report, self._moment)
        made: list[Manifest] = []

        def build(folder: Path, version: int) -> tuple[Manifest, None]:
            newest = self.newest()
            if newest is None or newest.version != base.version:
                raise Failure(f"repository {self.place.root}: version {base.version} was replaced meanwhile; try again")
            made.append(self._build_items(folder, version, base, catalogue, steps))
            return made[0], None

        version = publish_bundle(
            self.place.root, build, server=self._server, config=self._triton(), now=self._now, report=steps
        )
        return self._outcome(version, made[0], base, steps)

    def _build_items(
        self, folder: Path, version: int, base: Manifest, catalogue: Catalogue, report: Report
    ) -> Manifest:
        with timed(report, "catalogue"):
            linked = bundle.link_sealed(self.place.folder(base.version), base, folder)
            snapshot = bundle.write_catalogue(folder, catalogue, base.model_config.codes)
        with timed(report, "seal"):
            manifest = msgspec.structs.replace(
                base,
                version=version,
                catalogue_revision=catalogue.revision,
                items=snapshot.trie.items,
                leaves=snapshot.trie.leaves,
                created_ms=int(self._now() * 1000),
                brought_ms=base.weights_ms,
                files=bundle.digest_files(folder, linked),
                item_sequence=catalogue.last_item,
                exported_by=code_version(),
                before=base.version,
                reason=None,
                promoted_from=None,
                format=bundle.FORMAT,
            )
            bundle.write_manifest(folder, manifest)
        return manifest

    def _build(self, folder: Path, version: int, before: Manifest | None, report: Report) -> tuple[Manifest, Expected]:
        from exporter.gate import Gate

        built = build_bundle(
            folder, version, self.export, self.place.templates,
            catalogue_of=self._catalogue_of, now=self._now, report=report,
        )  # fmt: skip
        with timed(report, "gate"):
            self._gate = self._gate or Gate(self._settings)
            served = (before, self.place.folder(before.version)) if before else None
            judged = self._gate.judge(self._open(), built.manifest, folder, built.snapshot, built.graph, served)
            manifest = msgspec.structs.replace(
                built.manifest, gate=judged.scores, before=before.version if before else None
            )
            bundle.write_manifest(folder, manifest)
        if judged.fault and self._settings.enabled:
            raise HeldBack(judged.fault, manifest, judged.scores)
        return manifest, built.expected

    def _outcome(self, version: int, manifest: Manifest, before: Manifest | None, steps: _Steps) -> Outcome:
        loaded = steps.moments.get("ask")
        if loaded is not None:
            note_first(self.place, version, self._now(), loaded.newest_event_ms)
        items_only = before is not None and before.weights == manifest.weights
        known = before is not None and before.sequence is not None and manifest.sequence is not None
        return Outcome(
            kind="published",
            version=version,
            items_only=items_only,
            manifest=manifest,
            seconds=dict(steps),
            scores=manifest.gate,
            sequences=(before.sequence, manifest.sequence) if known and not items_only else None,  # type: ignore[arg-type,union-attr]
            exported=steps.moments.get("install"),
            loaded=loaded,
        )

    def event_times(self, sequences: tuple[int, int]) -> list[int]:
        """Times in ms of the watches in the sessions (after, up to] of the state."""
        after, last = sequences
        times: list[int] = []
        for sequence, session in self._open().sessions(after=after):
            if sequence > last:
                break
            times += [item.ts for item in session.items]
        return times

    def _state(self) -> Path:
        return self.export.state or state_of_run(self.export.run_dir)

    def _triton(self) -> RecommendConfig:
        state = self._config.state or str(self._state().resolve())
        return msgspec.structs.replace(self._config, state=state)

    def _open(self) -> Reader:
        """The state as it is now."""
        from streaming.store import Reader

        if self._reader is None:
            self._reader = Reader(self._state())
        else:
            self._reader.refresh()
        return self._reader

    def _moment(self) -> Moment:
        reader = self._open()
        watermark = reader.watermark()
        late = reader.semantics().stream.max_out_of_orderness_ms
        return Moment(wall_ms=int(self._now() * 1000), newest_event_ms=None if watermark is None else watermark + late)

    def _catalogue_of(self, checkpoint: Checkpoint) -> Catalogue:
        newest = self.newest()
        if self._wanted is not None and checkpoint.step < self._wanted and newest and newest.step == checkpoint.step:
            raise Failure(
                f"the checkpoint of step {self._wanted} is damaged, and version {newest.version} of step {newest.step}, the "
                f"one before, serves already; delete {checkpoint.path.parent}/{self._wanted:09d}, or wait for the next one"
            )
        return self._fresh_catalogue(checkpoint.codebook_version)

    def _fresh_catalogue(self, codebook: str) -> Catalogue:
        """The catalogue of a codebook with every item that arrived since; read from the disk once."""
        from trainer.items import load_catalogue, refresh_catalogue

        held = self._catalogue
        if held is None or held.version != codebook:
            try:
                held = load_catalogue(self._state(), codebook)
            except UserError:
                bundle.check_codebooks(codebook, load_catalogue(self._state()).version)
                raise
        self._catalogue = refresh_catalogue(self._state(), self._open(), held)
        return self._catalogue


def publish(
    run_dir: Path,
    repository: Path,
    *,
    server: str | None = None,
    state: Path | None = None,
    checkpoint: Path | None = None,
    width: int = BeamConfig().width,
    reward: RewardConfig | None = None,
    config: RecommendConfig | None = None,
    gate: GateConfig | None = None,
    now: Callable[[], float] = time.time,
    report: Report = silent,
) -> int:
    """Make a version of a run's newest checkpoint (or of the one in `checkpoint`) and let Triton serve it.

    Args:
        run_dir: folder of the training run.
        repository: folder of the model repository; made if it is not there.
        server: host:port of Triton's gRPC end; None = the version is served from the next start on.
        state: folder of the stream's state; None = the one that the run was trained on.
        checkpoint: folder of a checkpoint.
        width: beams of the search, of which a request may ask for as many sessions.
        reward: how the reward model's towers become the one reward that `select=reward` goes by.
        config: how Triton batches; its `state` is filled in where empty.
        gate: what a candidate must pass.
        now: wall clock in seconds.
        report: called with the name and the seconds of each step.

    Returns the version number. Raises UserError or Failure; then the served version is as it was; see `publish_bundle`.
    """
    export = Export(
        run_dir=run_dir, state=state, checkpoint=checkpoint, width=width, reward=reward or RewardConfig()
    )
    with Publisher(
        export, repository, server=server, config=config, gate=gate, now=now, report=report
    ) as publisher, publisher.alone():
        return publisher.publish().version
