"""`onerec serve`: a real Triton until stopped; `onerec recommend`: what it answers, in a table."""

from __future__ import annotations

import datetime
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onerec.console import ConfigOption, JsonOption, RepositoryOption, SetOption, err, out, print_json
from onerec.errors import Failure, OneRecError, UserError
from onerec.freshness import format_age

if TYPE_CHECKING:
    from exporter.client import Recommendation
    from exporter.server import TritonServer

CONTAINER_IMAGE = "nvcr.io/nvidia/tritonserver:24.12-py3"
"""The oldest image with Python 3.11 or newer inside (it has 3.12); newer ones serve the same folder."""
PIP_PACKAGES = "onnxruntime-gpu rocksdict==0.3.29 msgspec orjson"
LOOK_SECONDS = 0.2


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(serve)
    app.command()(recommend)


class _Stopped(BaseException):
    """SIGINT or SIGTERM came."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM end the block once; while it cleans up, further ones are ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        for ignored in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ignored, signal.SIG_IGN)
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stopped:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def container_command(repository: Path, state: Path | None) -> str:
    """The shell line that serves the same repository from NVIDIA's container image."""
    mounts = f"-v {repository.resolve()}:/repository"
    if state is not None:
        mounts += f" -v {state.resolve()}:/state -e ONEREC_STATE=/state"
    return (
        "docker run --rm --gpus=all --net=host --shm-size=1g -e PIP_BREAK_SYSTEM_PACKAGES=1 "
        f"{mounts} {CONTAINER_IMAGE} sh -c "
        f"'pip install {PIP_PACKAGES} && tritonserver --model-repository=/repository --model-control-mode=explicit "
        "--load-model=recommend --disable-auto-complete-config --strict-readiness=false'"
    )


def serve(
    repository: RepositoryOption,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Folder of the stream's state on this host, to look up stored histories; "
                     "default: the one that was published from.", show_default=False),
    ] = None,
    http_port: Annotated[int, typer.Option(help="Port for HTTP; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC; 0 takes a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port for Prometheus; 0 takes a free one.")] = 8002,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    server: Annotated[
        Path | None,
        typer.Option("--server", help="Another tritonserver program than the wheel's.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Serve the versions of a repository with Triton until Ctrl-C or SIGTERM.

    The newest two versions are loaded; one that is damaged is set aside. `onerec publish --server` swaps in new ones
    while it runs. On a host without the state only requests that bring their own history are answered.

    Example: `onerec serve --repository repository --state state`
    """
    from exporter.client import Client
    from exporter.publish import load_repository
    from exporter.server import Ports, TritonServer
    from onerec.config import load_config

    load_config(config, settings)
    if state is not None and not state.is_dir():
        raise UserError(f"state {state}: no such folder; make it with `onerec replay FILE --state {state}`")
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"repository {repository} cannot be made: {error.strerror}; name another folder") from None
    ports = Ports(host=host, http=http_port, grpc=grpc_port, metrics=metrics_port)
    log = repository / ".onerec" / "triton.log"
    with _stoppable(), TritonServer(repository, state, ports=ports, binary=server, log=log) as triton:
        with Client(triton.url) as client:
            version, refused = load_repository(repository, client)
        for number, reason in sorted(refused.items()):
            err.print(f"version {number} was set aside: {reason}", style="yellow", markup=False, highlight=False)
        if not json:
            err.print(f"the same from NVIDIA's image: {container_command(repository, state)}", markup=False,
                      highlight=False, style="dim", soft_wrap=True)
        _say_ready(triton, version, state, json=json)
        while (status := triton.returncode()) is None:
            time.sleep(LOOK_SECONDS)
        raise Failure(f"Triton ended by itself (status {status}); its log is {log}:\n{triton.log_tail()}")


def _say_ready(triton: TritonServer, version: int | None, state: Path | None, *, json: bool) -> None:
    if json:
        print_json({"grpc": triton.url, "http": triton.http_url, "metrics": triton.metrics_url, "version": version,
                    "state": None if state is None else str(state), "pid": triton.pid})
        return
    serving = "no version yet (publish one)" if version is None else f"version {version}"
    histories = f"histories from {state}" if state else "histories from the state that was published from"
    out.print(f"ready: gRPC {triton.url}, HTTP {triton.http_url}, metrics {triton.metrics_url}; {serving}; {histories}; "
              "Ctrl-C ends", highlight=False, soft_wrap=True, markup=False)


def recommend(
    user: Annotated[str | None, typer.Argument(help="User whose stored history is used.", show_default=False)] = None,
    history: Annotated[
        str | None,
        typer.Option("--history", help="Item ids instead of a user, oldest first, with commas; '' is the empty history.",
                     show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(help="Sessions wanted, best first.")] = 1,
    select: Annotated[
        str, typer.Option("--select", help="What chooses among the beams: likelihood, or reward (the reward model).")
    ] = "likelihood",
    server: Annotated[str, typer.Option(help="Triton's gRPC address.")] = "127.0.0.1:8001",
    repository: Annotated[
        Path | None,
        typer.Option("--repository", help="Model repository, to show tags and codes of the items.", show_default=False),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="State of the stream, to tell how far the version is behind it.",
                     show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Ask Triton for sessions of videos, for a user or for a history.

    The four columns behind the score are the reward model's: watch time, effective views, follow and like of the session,
    each from 0 to 1; they are left out for a version without one.

    Example: `onerec recommend u17 --count 3 --select reward --repository repository --state state`
    """
    from exporter.client import Client

    if (user is None) == (history is None):
        raise UserError("recommend: name a user, or give --history a,b,c, one of the two")
    items = None if history is None else [part.strip() for part in history.split(",")] if history else []
    with Client(server) as client:
        answer = client.recommend(user, items, count, select=select)
    details = _details(repository, answer)
    newest = _newest_event(state)
    now = int(time.time() * 1000)
    if json:
        print_json(_as_json(answer, details, newest, now))
    else:
        _print_answer(answer, details, newest, now)


Details = dict[str, dict[str, Any]]


def _details(repository: Path | None, answer: Recommendation) -> Details:
    """Tags and codes of the answered items, from the bundle of the version that answered."""
    if repository is None:
        return {}
    from exporter.bundle import read_catalogue, read_tags
    from exporter.repository import Repository

    folder = Repository(repository).folder(answer.model_version)
    snapshot, tags = read_catalogue(folder), read_tags(folder)
    wanted = {item for session in answer.items for item in session}
    return {
        item: {"tags": tags[row], "codes": snapshot.item_codes[row].tolist()}
        for row, item in enumerate(snapshot.item_ids)
        if item in wanted
    }


def _newest_event(state: Path | None) -> int | None:
    """Event time in ms of the newest event of a state; None where it is not asked for or cannot be told."""
    if state is None:
        return None
    from onerec.probe import stream_marks

    try:
        return stream_marks(state).event
    except OneRecError as error:
        err.print(f"onerec: {error}", style="yellow", markup=False, highlight=False)
        return None


def _as_json(answer: Recommendation, details: Details, newest: int | None, now: int) -> dict[str, Any]:
    watermark = answer.watermark
    return {
        "version": answer.model_version,
        "watermark": watermark,
        "behind_newest_event_ms": None if newest is None or watermark is None else newest - watermark,
        "age_ms": None if watermark is None else now - watermark,
        "sessions": [
            {
                "score": score,
                "rewards": answer.rewards[place] if answer.rewards else None,
                "items": [{"item_id": item, **details.get(item, {})} for item in session],
            }
            for place, (session, score) in enumerate(zip(answer.items, answer.scores, strict=True))
        ],
    }


def _print_answer(answer: Recommendation, details: Details, newest: int | None, now: int) -> None:
    from rich.table import Table

    from trainer.reward_weights import TARGETS

    table = Table(box=None, pad_edge=False)
    figures = ["score", *(TARGETS if answer.rewards else [])]
    for name in ("session", "rank", "item", *(["tags", "codes"] if details else []), *figures):
        table.add_column(name, justify="left" if name in ("item", "tags", "codes") else "right")
    for number, (session, score) in enumerate(zip(answer.items, answer.scores, strict=True), start=1):
        rewards = [f"{reward:.3f}" for reward in answer.rewards[number - 1]] if answer.rewards else []
        for rank, item in enumerate(session, start=1):
            known = details.get(item, {"tags": [], "codes": []})
            extra = [", ".join(known["tags"]), " ".join(map(str, known["codes"]))] if details else []
            table.add_row(*(["", str(rank)] if rank > 1 else [str(number), "1"]), item, *extra,
                          *([f"{score:.2f}", *rewards] if rank == 1 else []), end_section=rank == len(session))
    out.print(table)
    if answer.watermark is None:
        out.print(f"version {answer.model_version} has learnt nothing yet", highlight=False)
        return
    when = datetime.datetime.fromtimestamp(answer.watermark / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    behind = f", {format_age(newest - answer.watermark)} behind the newest event" if newest is not None else ""
    out.print(f"version {answer.model_version} has learnt up to {when} UTC{behind}, "
              f"{format_age(now - answer.watermark)} ago by the clock", highlight=False, soft_wrap=True)
