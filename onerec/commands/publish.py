"""`onerec export`, `publish`, `rollback` and `versions`: from a checkpoint to the version that Triton answers with."""

from __future__ import annotations

import datetime
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from onerec.config import load_config
from onerec.console import (
    ConfigOption,
    JsonOption,
    RepositoryOption,
    RunOption,
    SetOption,
    err,
    out,
    print_json,
)
from onerec.freshness import format_age

if TYPE_CHECKING:
    from exporter.repository import VersionInfo

ServerOption = Annotated[
    str | None,
    typer.Option("--server", help="Triton's gRPC address, HOST:PORT; without it the next start serves the version.",
                 show_default=False),
]
RunStateOption = Annotated[
    Path | None,
    typer.Option("--state", help="Folder of the stream's state; default: the one that the run was trained on.",
                 show_default=False),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="Folder of a checkpoint; default: the newest of the run.", show_default=False),
]


TABLE_ROWS = 20
"""Newest versions that `onerec versions` shows; `--json` has all that the record still knows."""


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(export)
    app.command()(publish)
    app.command()(rollback)
    app.command()(versions)


class _Seconds(dict[str, float]):
    """Seconds by step, said as they come."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet

    def __call__(self, step: str, seconds: float) -> None:
        self[step] = seconds
        if not self._quiet:
            err.print(f"  {step:<16}{seconds:7.2f} s", highlight=False)


def publish(
    run: RunOption,
    repository: RepositoryOption,
    server: ServerOption = None,
    state: RunStateOption = None,
    checkpoint: CheckpointOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Make a version of the newest checkpoint and let Triton serve it.

    Weights go beside a graph that is traced once an architecture (about a minute, the first time only); the catalogue is
    taken as it is now, new items included. The version is checked against torch, put in place by one rename, loaded while
    the version before serves on, and asked. One that fails any of this is set aside with the reason; nothing that is
    served changes then.

    Example: `onerec publish --run run --repository repository --server 127.0.0.1:8001`
    """
    from exporter.publish import publish as make
    from exporter.repository import Repository
    from exporter.triton_config import RecommendConfig

    configuration = load_config(config, settings)
    serve = configuration.serve
    seconds = _Seconds(quiet=json)
    began = time.perf_counter()
    version = make(
        run,
        repository,
        server=server,
        state=state,
        checkpoint=checkpoint,
        width=configuration.beam.width,
        reward=configuration.reward,
        config=RecommendConfig(
            site_packages=sysconfig.get_path("purelib"),
            threads=serve.threads,
            max_batch=serve.max_batch,
            queue_delay_us=serve.queue_delay_us,
            max_queue_size=serve.max_queue_size,
        ),
        report=seconds,
    )
    total = time.perf_counter() - began
    info = next(entry for entry in Repository(repository).infos() if entry.version == version)
    if json:
        print_json({**msgspec.to_builtins(info), "seconds": {**seconds, "total": total}})
        return
    where = f"answers at {server}" if server else "is in place; the next `onerec serve` answers with it"
    out.print(f"version {version} (step {info.step}, {info.items} items, learnt up to {_when(info.watermark)}) {where}, "
              f"{total:.1f} s", highlight=False, soft_wrap=True)


def export(
    run: RunOption,
    to: Annotated[Path, typer.Option("--out", help="Folder to make; must not be there yet.")],
    plain: Annotated[
        bool,
        typer.Option("--plain", help="A model for Triton's own ONNX Runtime backend, the trie baked into the graph."),
    ] = False,
    state: RunStateOption = None,
    checkpoint: CheckpointOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Write what `publish` would serve into a folder, without a repository.

    Example: `onerec export --run run --out bundle`
    """
    from exporter.export import Export, export_bundle, export_plain_model

    configuration = load_config(config, settings)
    chosen = Export(
        run_dir=run, state=state, checkpoint=checkpoint, width=configuration.beam.width, reward=configuration.reward
    )
    seconds = _Seconds(quiet=json)
    manifest = (export_plain_model if plain else export_bundle)(to, chosen, report=seconds)
    if json:
        print_json({"out": str(to), **manifest, "seconds": dict(seconds)})
        return
    out.print(f"{to}: step {manifest['step']}, {manifest['items']} items", highlight=False)


def rollback(repository: RepositoryOption, server: ServerOption = None, json: JsonOption = False) -> None:
    """Take the newest version back: the one before serves again, without a failed request.

    The version taken back is kept in REPOSITORY/.onerec/rejected and its number is never used again.

    Example: `onerec rollback --repository repository --server 127.0.0.1:8001`
    """
    from exporter.publish import rollback as go_back

    left, served = go_back(repository, server=server)
    if json:
        print_json({"left": left, "serving": served})
        return
    where = f"answers at {server}" if server else "is the newest in place"
    out.print(f"version {left} is taken back; version {served} {where}", highlight=False)


def versions(repository: RepositoryOption, server: ServerOption = None, json: JsonOption = False) -> None:
    """Every version of a repository: its state, the step and event time that it has learnt up to, its age.

    The state is that of the folders; with `--server`, what Triton says of each version is added.

    Example: `onerec versions --repository repository`
    """
    from exporter.client import Client
    from exporter.repository import Repository

    infos = Repository(repository).infos()
    loaded: dict[int, str] = {}
    if server:
        with Client(server) as client:
            loaded = {entry.version: entry.state for entry in client.versions()}
    if json:
        print_json([{**msgspec.to_builtins(info), **({"triton": loaded.get(info.version)} if server else {})}
                    for info in infos])
        return
    if not infos:
        out.print(f"repository {repository} holds no versions; publish one: onerec publish --run DIR "
                  f"--repository {repository}", highlight=False)
        return
    _print_table(infos[:TABLE_ROWS], loaded if server else None)


def _print_table(infos: list[VersionInfo], loaded: dict[int, str] | None) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("version", "state", *(["Triton"] if loaded is not None else []), "step", "learnt up to", "items",
                 "age", "reason"):
        right = name in ("version", "step", "items", "age")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "reason")
    now = int(time.time() * 1000)
    for info in infos:
        table.add_row(
            str(info.version),
            info.state,
            *([loaded.get(info.version, "-")] if loaded is not None else []),
            "-" if info.step is None else str(info.step),
            _when(info.watermark),
            "-" if info.items is None else str(info.items),
            format_age(None if info.created_ms is None else now - info.created_ms),
            info.reason.partition("\n")[0],
        )
    out.print(table)


def _when(ms: int | None) -> str:
    """Event time in words."""
    if ms is None:
        return "no data"
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M")
