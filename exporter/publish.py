"""From a checkpoint to the version that answers: build, rename, load, ask; or set aside, the old version serving on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from exporter import bundle
from exporter.bundle import Manifest
from exporter.client import Client
from exporter.export import Expected, Export, build_bundle, state_of_run
from exporter.repository import Repository
from exporter.steps import Report, silent, timed
from exporter.triton_config import SERVED_VERSIONS, RecommendConfig
from onerec.errors import Failure, OneRecError, UserError
from trainer.config import BeamConfig, RewardConfig
from trainer.reward_weights import tower_weights

LOCK_SECONDS = 60.0
"""How long a starting server waits for a publisher at work."""

Build = Callable[[Path, int], tuple[Manifest, Expected]]
"""Fills an empty folder with a sealed bundle of the given version; returns its manifest and a request to try it with."""


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
        now: wall clock in seconds.
        report: called with the name and the seconds of each step.

    Returns the version number. Raises UserError or Failure; then the served version is as it was, and a version that
    failed after it was complete lies in REPOSITORY/.onerec/rejected with the reason.
    """
    state = state or state_of_run(run_dir)
    reward = reward or RewardConfig()
    tower_weights(reward)  # refuses weights that are all 0 before anything is built
    export = Export(run_dir=run_dir, state=state, checkpoint=checkpoint, width=width, reward=reward)
    config = config or RecommendConfig()
    config = msgspec.structs.replace(config, state=config.state or str(state.resolve()))
    templates = Repository(repository).templates

    def build(folder: Path, version: int) -> tuple[Manifest, Expected]:
        return build_bundle(folder, version, export, templates, now=now, report=report)

    return publish_bundle(repository, build, server=server, config=config, now=now, report=report)


def publish_bundle(
    repository: Path,
    build: Build,
    *,
    server: str | None = None,
    config: RecommendConfig | None = None,
    now: Callable[[], float] = time.time,
    report: Report = silent,
) -> int:
    """Give what `build` makes the next version number and let Triton serve it; see `publish`."""
    place = Repository(repository)
    with place.lock():
        client = Client(server) if server else None
        try:
            if client and not client.alive():
                raise Failure(
                    f"Triton at {client.url} does not answer, so nothing was published; start it with `onerec serve`, "
                    "or leave out --server: the version is then served from the next start on"
                )
            with timed(report, "recover"):
                place.recover(now())
            version = place.next_version()
            staged = place.new_staging(version)
            try:
                with place.writing():
                    manifest, expected = build(staged, version)
            except BaseException:
                place.clean_staging()
                raise
            with timed(report, "install"):
                place.write_config(config or RecommendConfig())
                place.install(staged, version)
            if client:
                _load_and_ask(place, client, version, expected, now, report)
            with timed(report, "record"):
                place.record("published", version, now(), manifest)
                place.prune()
            return version
        finally:
            if client:
                client.close()


def rollback(
    repository: Path, *, server: str | None = None, now: Callable[[], float] = time.time
) -> tuple[int, int]:
    """Take the newest version back: the one before serves again, without a gap. Returns (version left, version served).

    The version taken back lies in REPOSITORY/.onerec/rejected. Raises UserError where there is none before it, and
    Failure, with everything as it was, where Triton cannot serve it.
    """
    place = Repository(repository)
    if not place.model.is_dir():
        raise UserError(f"repository {repository} holds no versions; publish first: onerec publish --run DIR")
    with place.lock():
        place.recover(now())
        versions = place.versions()
        if len(versions) < SERVED_VERSIONS:
            raise UserError(
                f"repository {repository} has {len(versions)} version(s), so there is none before to go back to; "
                "`onerec versions` shows what is there"
            )
        left, wanted = versions[-1], versions[-2]
        bundle.verify_bundle(place.folder(wanted))
        client = Client(server) if server else None
        try:
            if client and not client.alive():
                raise Failure(
                    f"Triton at {client.url} does not answer, so nothing was rolled back; start it with `onerec serve`, "
                    "or leave out --server"
                )
            aside = place.set_aside(left, f"rolled back to version {wanted}", now(), event="rolled back")
            if client:
                client.load()
                answered = client.recommend(history=[]).model_version
                if answered != wanted:
                    raise Failure(
                        f"Triton at {client.url} answers with version {answered}, not {wanted}: does it serve "
                        f"{repository}? Version {left} lies in {aside}"
                    )
        finally:
            if client:
                client.close()
        return left, wanted


def load_repository(
    repository: Path, client: Client, *, now: Callable[[], float] = time.time
) -> tuple[int | None, dict[int, str]]:
    """At a server's start: load the newest versions; those that are damaged or that Triton refuses are set aside.

    Returns the version that answers (None: there is none) and the reasons by version set aside.
    """
    place = Repository(repository)
    with place.lock(wait_seconds=LOCK_SECONDS):
        refused = place.recover(now())
        refused |= _load_versions(place, client, now)
        versions = place.versions()
        return (versions[-1] if versions else None), refused


def _load_versions(place: Repository, client: Client, now: Callable[[], float]) -> dict[int, str]:
    """Have Triton load what is on disk; versions it refuses are set aside, so that the others are served cleanly.

    Returns the reasons by version. Raises Failure where the fault is not that of a version.
    """
    refused: dict[int, str] = {}
    while versions := place.versions():
        try:
            client.load()
            break
        except OneRecError as error:
            if not client.alive():
                raise
            served = versions[-SERVED_VERSIONS:]
            faults = {entry.version: entry.reason for entry in client.versions() if entry.state != "READY"}
            bad = [version for version in served if version in faults]
            if not bad:
                raise
            for version in bad:
                refused[version] = faults[version] or str(error)
                place.set_aside(version, refused[version], now())
    return refused


def _load_and_ask(
    place: Repository, client: Client, version: int, expected: Expected, now: Callable[[], float], report: Report
) -> None:
    """Load a version that is in place and ask it; on any fault it is set aside and Triton forgets it."""
    try:
        with timed(report, "load"):
            refused = _load_versions(place, client, now)
        if version not in refused:
            with timed(report, "ask"):
                _ask(client, version, expected)
            return
        reason = refused[version]
    except OneRecError as error:
        reason = str(error)
        place.set_aside(version, reason, now())
        try:
            _load_versions(place, client, now)
        except OneRecError:
            pass  # the server is gone or at fault itself; the first error says more
    left = place.versions()
    serving = f"version {left[-1]} serves on" if left else "no version is served"
    raise Failure(f"version {version} was set aside in {place.rejected / str(version)}; {serving}. Reason: {reason}")


def _ask(client: Client, version: int, expected: Expected) -> None:
    asked = [("likelihood", expected.sessions), *([("reward", expected.by_reward)] if expected.by_reward else [])]
    for select, sessions in asked:
        answer = client.recommend(history=expected.history, count=len(sessions), select=select)
        if answer.model_version != version:
            raise Failure(
                f"Triton at {client.url} answers with version {answer.model_version}, not {version}: "
                "does it serve this repository?"
            )
        if answer.items[0] not in sessions:
            raise Failure(
                f"Triton at {client.url} answers {answer.items[0]} by {select} where the bundle gives {sessions[0]}"
            )
        if expected.by_reward and answer.rewards is None:
            raise Failure(f"Triton at {client.url} gives no rewards, though the bundle holds a reward model")
