"""From a checkpoint to the version that answers: build, rename, load, ask; or set aside, the old version serving on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from exporter import bundle
from exporter.bundle import Manifest
from exporter.client import Client
from exporter.export import Expected
from exporter.release import HeldBack, hold_back
from exporter.repository import Repository
from exporter.steps import Report, silent, timed
from exporter.triton_config import SERVED_VERSIONS, RecommendConfig
from onerec.errors import Failure, OneRecError

LOCK_SECONDS = 60.0
"""How long a starting server waits for a publisher at work."""

Build = Callable[[Path, int], tuple[Manifest, Expected | None]]
"""Fills an empty folder with a sealed bundle of the given version; returns its manifest and a request to try it with, None
where any known items will do. Raises HeldBack for a sealed candidate that users must not get."""


def publish_bundle(
    repository: Path,
    build: Build,
    *,
    server: str | None = None,
    config: RecommendConfig | None = None,
    event: Literal["published", "promoted"] = "published",
    reason: str = "",
    now: Callable[[], float] = time.time,
    report: Report = silent,
    lock_seconds: float = 0.0,
) -> int:
    """Give what `build` makes the next version number and let Triton serve it.

    Args:
        repository: folder of the model repository; made if it is not there.
        build: makes the bundle.
        server: host:port of Triton's gRPC end; None = the version is served from the next start on.
        config: how Triton batches; None leaves an existing one as it is.
        event: what the repository's record calls it, with `reason`.
        now: wall clock in seconds.
        report: called with the name and the seconds of each step.
        lock_seconds: how long another process at work is waited for.

    Returns the version number. Raises UserError or Failure; then the served version is as it was. A version that
    failed after it was complete lies in REPOSITORY/.onerec/rejected with the reason, one that did not pass the gate
    (HeldBack) in REPOSITORY/.onerec/held.
    """
    place = Repository(repository)
    with place.lock(wait_seconds=lock_seconds):
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
            except HeldBack as fault:
                aside = hold_back(place, staged, version, fault, now())
                served = place.versions()
                serving = f"version {served[-1]} serves on" if served else "no version is served"
                told = (
                    f"version {version} was held back in {aside}; {serving}. Reason: {fault.reason}. "
                    f'To serve it all the same: onerec promote {version} --repository {repository} --reason "..."'
                )
                raise HeldBack(fault.reason, fault.manifest, fault.scores, told) from None
            except BaseException:
                place.clean_staging()
                raise
            with timed(report, "install"):
                if config is not None or not place.configured:
                    place.write_config(config or RecommendConfig())
                place.install(staged, version)
            if client:
                _load_and_ask(place, client, manifest, expected, now, report)
            with timed(report, "record"):
                place.record(event, version, now(), manifest, reason)
                place.prune()
            return version
        finally:
            if client:
                client.close()


def load_repository(
    repository: Path, client: Client, *, now: Callable[[], float] = time.time
) -> tuple[int | None, dict[int, str]]:
    """At a server's start: load the newest versions; those that are damaged or that Triton refuses are set aside.

    Returns the version that answers (None: there is none) and the reasons by version set aside.
    """
    place = Repository(repository)
    with place.lock(wait_seconds=LOCK_SECONDS):
        refused = place.recover(now())
        refused |= load_versions(place, client, now)
        versions = place.versions()
        return (versions[-1] if versions else None), refused


def load_versions(place: Repository, client: Client, now: Callable[[], float]) -> dict[int, str]:
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
    place: Repository, client: Client, manifest: Manifest, expected: Expected | None, now: Callable[[], float],
    report: Report,
) -> None:  # fmt: skip
    """Load a version that is in place and ask it; on any fault it is set aside and Triton forgets it."""
    version = manifest.version
    try:
        with timed(report, "load"):
            refused = load_versions(place, client, now)
        if version not in refused:
            with timed(report, "ask"):
                if expected is None:
                    _ask_anything(client, version, bundle.read_catalogue(place.folder(version)).item_ids)
                else:
                    _ask(client, version, expected)
            return
        reason = refused[version]
    except OneRecError as error:
        reason = str(error)
        place.set_aside(version, reason, now())
        try:
            load_versions(place, client, now)
        except OneRecError:
            pass  # the server is gone or at fault itself; the first error says more
    left = place.versions()
    serving = f"version {left[-1]} serves on" if left else "no version is served"
    raise Failure(f"version {version} was set aside in {place.rejected / str(version)}; {serving}. Reason: {reason}")


def _ask_anything(client: Client, version: int, item_ids: Sequence[str]) -> None:
    """A version of weights that were checked before must answer with items of its own catalogue."""
    answer = client.recommend(history=item_ids[-1:])
    _check_version(client, version, answer.model_version)
    if strangers := set(answer.items[0]).difference(item_ids):
        raise Failure(f"Triton at {client.url} answers {sorted(strangers)[0]!r}, which version {version} does not hold")


def _check_version(client: Client, version: int, answered: int) -> None:
    if answered != version:
        raise Failure(
            f"Triton at {client.url} answers with version {answered}, not {version}: does it serve this repository?"
        )


def _ask(client: Client, version: int, expected: Expected) -> None:
    asked = [("likelihood", expected.sessions), *([("reward", expected.by_reward)] if expected.by_reward else [])]
    for select, sessions in asked:
        answer = client.recommend(history=expected.history, count=len(sessions), select=select)
        _check_version(client, version, answer.model_version)
        if answer.items[0] not in sessions:
            raise Failure(
                f"Triton at {client.url} answers {answer.items[0]} by {select} where the bundle gives {sessions[0]}"
            )
        if expected.by_reward and answer.rewards is None:
            raise Failure(f"Triton at {client.url} gives no rewards, though the bundle holds a reward model")
