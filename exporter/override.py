"""What a person decides against the gate, with a reason that is kept: back to other weights, or a candidate forward."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from exporter import bundle
from exporter.bundle import Manifest
from exporter.client import Client
from exporter.export import Expected
from exporter.parity import parity_rows
from exporter.publish import LOCK_SECONDS, publish_bundle
from exporter.release import HELD_FILE, begin_hold, held_versions, lift_hold, read_hold, reason_given
from exporter.repository import REASON_FILE, Repository, manifest_or_none
from exporter.steps import Report, silent
from onerec.errors import Failure, UserError


class Promoted(msgspec.Struct, frozen=True, kw_only=True):
    """What `promote` did: the candidate and the version it is served as, None where only the hold was lifted."""

    candidate: int | None
    version: int | None
    lifted: bool


def rollback(
    repository: Path,
    *,
    reason: str,
    server: str | None = None,
    now: Callable[[], float] = time.time,
    lock_seconds: float = LOCK_SECONDS,
) -> tuple[list[int], int]:
    """Take the newest weights back: the version of other weights before them serves again, without a gap.

    All versions of the newest weights go, those too that only brought items; they lie in REPOSITORY/.onerec/rejected.
    Nothing is published from then on until `promote`. A publisher at work is waited for, `lock_seconds` at most. Returns
    (versions left, version served). Raises UserError where there are no weights before, and
    Failure, with everything as it was, where Triton is not there.
    """
    reason = reason_given(reason)
    place = Repository(repository)
    if not place.model.is_dir():
        raise UserError(f"repository {repository} holds no versions; publish first: onerec publish --run DIR")
    with place.lock(wait_seconds=lock_seconds):
        place.recover(now())
        versions = place.versions()
        wanted = _other_weights(place, versions)
        if wanted is None:
            raise UserError(
                f"repository {repository} has {len(versions)} version(s) of one model, so there is none before to go back "
                "to; `onerec versions` shows what is there"
            )
        bundle.verify_bundle(place.folder(wanted))
        client = Client(server) if server else None
        try:
            if client and not client.alive():
                raise Failure(
                    f"Triton at {client.url} does not answer, so nothing was rolled back; start it with `onerec serve`, "
                    "or leave out --server"
                )
            left = [version for version in versions if version > wanted]
            begin_hold(place, reason, left, wanted, now())
            for version in left:
                place.set_aside(version, f"rolled back to version {wanted}: {reason}", now(), event="rolled back")
            if client:
                client.load()
                answered = client.recommend(history=[]).model_version
                if answered != wanted:
                    raise Failure(
                        f"Triton at {client.url} answers with version {answered}, not {wanted}: does it serve "
                        f"{repository}? What was taken back lies in {place.rejected}"
                    )
        finally:
            if client:
                client.close()
        return left, wanted


def _other_weights(place: Repository, versions: list[int]) -> int | None:
    """The newest version whose weights are not those of the newest version; one without a manifest counts as other."""
    if not versions:
        return None
    newest = manifest_or_none(place.folder(versions[-1]))
    for version in reversed(versions[:-1]):
        manifest = manifest_or_none(place.folder(version))
        if newest is None or manifest is None or manifest.weights != newest.weights:
            return version
    return None


def promote(
    repository: Path,
    version: int | None = None,
    *,
    reason: str,
    server: str | None = None,
    now: Callable[[], float] = time.time,
    report: Report = silent,
) -> Promoted:
    """Lift the hold, and serve the candidate `version` that was held back or rolled back, whatever the gate says.

    Without `version`: a hold is lifted and nothing else; where there is none, the newest candidate held back is served. It
    gets the next version number, as a number means one bundle for good. It must be sound, and Triton must load it and
    answer. Raises UserError where there is nothing to promote.
    """
    reason = reason_given(reason)
    place = Repository(repository)
    hold, held = read_hold(place), held_versions(place)
    if version is None and hold is None:
        if not held:
            raise UserError(
                f"repository {repository}: nothing was held back and publishing is not on hold; `onerec versions` shows what "
                "is there"
            )
        version = held[0].version
    served = None
    if version is not None:
        served = _serve(place, version, reason, server, now, report)
    with place.lock(wait_seconds=LOCK_SECONDS):
        lifted = read_hold(place) is not None
        lift_hold(place)
        if lifted:
            newest = place.versions()[-1]
            place.record("hold lifted", newest, now(), manifest_or_none(place.folder(newest)), reason)
    return Promoted(candidate=version, version=served, lifted=lifted)


def _serve(
    place: Repository, candidate: int, reason: str, server: str | None, now: Callable[[], float], report: Report
) -> int:
    """The candidate under the next version number, loaded and asked."""
    source = place.held / str(candidate)
    if not source.is_dir():
        source = place.rejected / str(candidate)
        undone = [event.event for event in place.events() if event.version == candidate]
        if not source.is_dir() or undone[-1:] != ["rolled back"]:
            known = ", ".join(str(entry.version) for entry in held_versions(place)) or "none"
            raise UserError(
                f"repository {place.root}: version {candidate} was neither held back nor rolled back, or is no longer kept; "
                f"held back are: {known}"
            )
    manifest = bundle.verify_bundle(source)
    if manifest.parity is None:
        raise UserError(
            f"version {candidate} cannot be served: its weights are not finite or its graph does not answer as the model; "
            "train on, or roll the run back to an older checkpoint"
        )
    if manifest.format != bundle.FORMAT:
        raise UserError(f"version {candidate} is of format {manifest.format}, now it is {bundle.FORMAT}; publish again")

    def build(folder: Path, version: int) -> tuple[Manifest, Expected]:
        folder.rmdir()
        shutil.copytree(source, folder, copy_function=_link, ignore=shutil.ignore_patterns(HELD_FILE, REASON_FILE))
        versions = place.versions()
        made = msgspec.structs.replace(
            manifest, version=version, created_ms=int(now() * 1000), before=versions[-1] if versions else None,
            brought_ms=None, reason=reason, promoted_from=candidate,
        )  # fmt: skip
        (folder / bundle.MANIFEST_FILE).unlink()
        bundle.write_manifest(folder, made)
        return made, _expected(folder)

    version = publish_bundle(
        place.root, build, server=server, event="promoted", reason=reason, now=now, report=report,
        lock_seconds=LOCK_SECONDS,
    )  # fmt: skip
    with place.lock(wait_seconds=LOCK_SECONDS):
        place.record("promoted", candidate, now(), manifest, f"as version {version}: {reason}")
        shutil.rmtree(source, ignore_errors=True)
    return version


def _link(source: str, target: str) -> None:
    bundle.link(Path(source), Path(target))


def _expected(folder: Path) -> Expected:
    """What a sealed bundle answers in this process."""
    from serving_config.recommend.engine import Engine, Sessions, Wanted

    engine = Engine(folder)
    rows = parity_rows(engine.snapshot, engine.manifest.model_config)[-1]
    history = [engine.snapshot.item_ids[row] for row in rows]
    codes = engine.snapshot.item_codes[rows].astype(np.int64)
    answers = {}
    for select in ("likelihood", *(["reward"] if engine.has_rewards else [])):
        [found] = engine.answer([Wanted(history=codes, count=1, select=select)])  # type: ignore[arg-type]
        if not isinstance(found, Sessions):
            raise Failure(f"version {engine.manifest.version} gives no session: {found}")
        answers[select] = [[item.decode() for item in session] for session in found.items]
    return Expected(history=history, sessions=answers["likelihood"], by_reward=answers.get("reward", []))
