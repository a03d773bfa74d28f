"""Asking each part how far it has come: state, run, repository and Triton → watermarks. Nothing here raises for a part
that is missing; what could not be asked is said in words instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from onerec.errors import OneRecError
from onerec.freshness import Watermarks

if TYPE_CHECKING:
    from exporter.bundle import Manifest

T = TypeVar("T")

ANSWER_SECONDS = 5.0


class StreamMarks(NamedTuple):
    """Newest event, watermark, and end of the newest session of a state, epoch ms."""

    event: int | None = None
    history: int | None = None
    session: int | None = None


class Mark(NamedTuple):
    """A step or version, and the event time in ms that it has learnt up to."""

    number: int | None = None
    watermark: int | None = None


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What was found: watermarks, the step and versions behind them, and why a part said nothing.

    Of several servers `served` is what all that answer have learnt up to, and the version is that of the one behind;
    `answers` has each server's own, an empty mark for one that does not answer.
    """

    watermarks: Watermarks
    step: int | None
    exported_version: int | None
    served_version: int | None
    faults: tuple[str, ...]
    answers: dict[str, Mark] = {}


def stream_marks(state: Path) -> StreamMarks:
    """How far the stream has come. Raises UserError where there is no state."""
    from streaming.store import Reader

    with Reader(state) as reader:
        watermark = reader.watermark()
        if watermark is None:
            return StreamMarks()
        last = reader.last_sequence()
        newest = next((session.end for _, session in reader.sessions(after=last - 1)), None) if last else None
        event = watermark + reader.semantics().stream.max_out_of_orderness_ms
        return StreamMarks(event=event, history=watermark, session=newest)


def trained_mark(run: Path) -> Mark:
    """The newest checkpoint. Its tensors are not read: a look must stay cheap."""
    from trainer.checkpoint import STATE_FILE, checkpoint_folder, checkpoint_steps

    steps = checkpoint_steps(run)
    if not steps:
        return Mark()
    record = msgspec.json.decode((checkpoint_folder(run, steps[-1]) / STATE_FILE).read_bytes())
    return Mark(steps[-1], record["watermark"])


def _newest_manifest(repository: Path) -> Manifest | None:
    """The manifest of the newest version in the repository."""
    from exporter.bundle import read_manifest
    from exporter.triton_config import MODEL_NAME

    model = repository / MODEL_NAME
    versions = [int(entry.name) for entry in model.iterdir() if entry.name.isdigit()] if model.is_dir() else []
    return read_manifest(model / str(max(versions))) if versions else None


def exported_mark(repository: Path) -> Mark:
    """The newest version in the repository."""
    manifest = _newest_manifest(repository)
    return Mark() if manifest is None else Mark(manifest.version, manifest.watermark)


def served_mark(server: str) -> Mark:
    """What Triton answers with. Raises Failure where it does not answer."""
    from exporter.client import Client

    with Client(server, timeout=ANSWER_SECONDS) as client:
        answer = client.recommend(history=[])
        return Mark(answer.model_version, answer.watermark)


def _least(marks: Iterable[Mark]) -> Mark:
    """The mark of the server that has learnt least; one that answers and has learnt nothing is the least of all."""
    known = [mark for mark in marks if mark.number is not None]
    return min(known, key=lambda mark: (mark.watermark is not None, mark.watermark or 0), default=Mark())


def probe(state: Path | None, run: Path | None, repository: Path | None, *servers: str | None) -> Findings:
    """Ask every part that is named."""
    faults: list[str] = []

    def ask(question: Callable[[], T], nothing: T) -> T:
        try:
            return question()
        except (OneRecError, OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
            faults.append(str(error).partition("\n")[0])
            return nothing

    stream = ask(lambda: stream_marks(state), StreamMarks()) if state else StreamMarks()
    trained = ask(lambda: trained_mark(run), Mark()) if run else Mark()
    exported = ask(lambda: exported_mark(repository), Mark()) if repository else Mark()
    answers = {server: ask(partial(served_mark, server), Mark()) for server in servers if server}
    served = _least(answers.values())
    return Findings(
        watermarks=Watermarks(event=stream.event, history=stream.history, session=stream.session,
                              trained=trained.watermark, exported=exported.watermark, served=served.watermark),
        step=trained.number,
        exported_version=exported.number,
        served_version=served.number,
        faults=tuple(faults),
        answers=answers,
    )
