"""`onerec export`, `publish` and `versions`: from a checkpoint to the version that Triton answers with."""

from __future__ import annotations

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
    MetricsPortOption,
    RepositoryOption,
    RunOption,
    SetOption,
    err,
    out,
    print_json,
)
from onerec.errors import UserError
from onerec.freshness import format_age, format_time

if TYPE_CHECKING:
    from exporter.bundle import GateScores
    from exporter.export import Export
    from exporter.publisher import Outcome, Publisher
    from exporter.repository import VersionInfo
    from exporter.steps import Report
    from onerec.config import Config

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


STATUS_SECONDS = 1.0
"""Between two looks of `publish --follow` at what others have done to the repository."""
TABLE_ROWS = 20
"""Newest versions that `onerec versions` shows; `--json` has all that the record still knows."""


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(export)
    app.command()(publish)
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
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on: every newer checkpoint, and items that arrive in between.")
    ] = False,
    every: Annotated[
        float | None,
        typer.Option(help="With --follow: least seconds between versions; default publish.every_s.", min=0,
                     show_default=False),
    ] = None,
    items_every: Annotated[
        float | None,
        typer.Option(help="With --follow: least seconds between looks for new items; default publish.items_every_s.",
                     min=0, show_default=False),
    ] = None,
    metrics_port: MetricsPortOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Make a version of the newest checkpoint and let Triton serve it.

    Weights go beside a graph that is traced once an architecture (about a minute, the first time only); the catalogue is
    taken as it is now, new items included. The version is checked against torch and by the release gate (`[gate]`), put in
    place by one rename, loaded while the version before serves on, and asked. One that fails any of this is held back or
    set aside with the reason; nothing that is served changes then.

    With --follow one process does so until SIGTERM: it waits for Triton and for the first checkpoint, outlives their
    faults, and publishes new items with the served weights in between.

    Examples:

        onerec publish --run run --repository repository --server 127.0.0.1:8001

        onerec publish --follow --run run --repository repository --server 127.0.0.1:8001
    """
    from exporter.export import Export

    configuration = load_config(config, settings)
    export = Export(
        run_dir=run, state=state, checkpoint=checkpoint, width=configuration.beam.width, reward=configuration.reward
    )
    if not follow:
        if every is not None or items_every is not None:
            raise UserError("publish: --every and --items-every belong to --follow; give it too, or leave them out")
        _once(export, repository, server, configuration, metrics_port, json=json)
        return
    if checkpoint is not None:
        raise UserError("publish: --checkpoint names one checkpoint, --follow takes each as it comes; give one of the two")
    timing = configuration.publish
    _follow(
        export, repository, server, configuration, metrics_port, json=json,
        every_s=timing.every_s if every is None else every,
        items_every_s=timing.items_every_s if items_every is None else items_every,
    )


def _publisher(export: Export, repository: Path, server: str | None, settings: Config, report: Report) -> Publisher:
    from exporter.publisher import Publisher
    from exporter.triton_config import RecommendConfig

    serve = settings.serve
    return Publisher(
        export,
        repository,
        server=server,
        config=RecommendConfig(
            site_packages=sysconfig.get_path("purelib"),
            threads=serve.threads,
            max_batch=serve.max_batch,
            queue_delay_us=serve.queue_delay_us,
            max_queue_size=serve.max_queue_size,
        ),
        gate=settings.gate,
        report=report,
    )


def _once(
    export: Export, repository: Path, server: str | None, settings: Config, port: int | None, *, json: bool
) -> None:
    from exporter.release import status
    from exporter.repository import Repository
    from onerec.monitor.of_publish import PublishMetrics
    from onerec.monitor.opening import open_metrics

    seconds = _Seconds(quiet=json)
    began = time.perf_counter()
    with (
        open_metrics("publish", settings, port) as metrics,
        _publisher(export, repository, server, settings, seconds) as publisher,
        publisher.alone(),
    ):
        told = PublishMetrics(metrics, settings.freshness.clock)
        first = status(repository).first
        outcome = publisher.publish()
        total = time.perf_counter() - began
        told.outcome(outcome, publisher.event_times(outcome.sequences) if outcome.sequences else [], first)
        told.status(status(repository))
    info = next(entry for entry in Repository(repository).infos() if entry.version == outcome.version)
    if json:
        print_json({**msgspec.to_builtins(info), "gate": msgspec.to_builtins(outcome.scores),
                    "seconds": {**seconds, "total": total}})
        return
    where = f"answers at {server}" if server else "is in place; the next `onerec serve` answers with it"
    out.print(f"version {info.version} (step {info.step}, {info.items} items, learnt up to {format_time(info.watermark)}) "
              f"{where}, {total:.1f} s{_scores(outcome.scores)}", highlight=False, soft_wrap=True)


def _follow(
    export: Export, repository: Path, server: str | None, settings: Config, port: int | None, *, every_s: float,
    items_every_s: float, json: bool,
) -> None:  # fmt: skip
    from exporter.follow import Follower, Trouble
    from exporter.release import status
    from exporter.steps import silent
    from onerec.monitor.of_publish import PublishMetrics
    from onerec.monitor.opening import open_metrics
    from onerec.signals import stopping

    def say(line: str) -> None:
        err.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, markup=False, soft_wrap=True)

    with (
        open_metrics("publish", settings, port) as metrics,
        _publisher(export, repository, server, settings, silent) as publisher,
        stopping() as stop,
    ):
        figures = PublishMetrics(metrics, settings.freshness.clock, every_s)
        began = status(repository)
        figures.status(began)
        first = began.first
        looked = time.monotonic()

        def tell(outcome: Outcome) -> None:
            nonlocal first, looked
            times = publisher.event_times(outcome.sequences) if outcome.sequences and first else []
            figures.outcome(outcome, times, first)
            now = status(repository)
            first, looked = now.first, time.monotonic()
            figures.status(now)
            if json:
                print_json({"outcome": outcome.kind, "items_only": outcome.items_only, "version": outcome.version,
                            "step": outcome.manifest.step, "watermark": outcome.manifest.watermark,
                            "items": outcome.manifest.items, "reason": outcome.reason,
                            "gate": msgspec.to_builtins(outcome.scores), "seconds": outcome.seconds})
            else:
                say(_line(outcome))

        def complain(trouble: Trouble | None) -> None:
            if trouble is None:
                say("publishing goes on")
                return
            if trouble.kind == "fault":
                figures.failed()
            say(trouble.text)

        def each() -> None:
            nonlocal looked
            if time.monotonic() - looked >= STATUS_SECONDS:
                looked = time.monotonic()
                figures.status(status(repository))

        Follower(
            publisher, server=server, every_s=every_s, items_every_s=items_every_s, tell=tell, complain=complain,
            stopped=lambda: bool(stop),
        ).run(each)  # fmt: skip
    say("stopped")


def _line(outcome: Outcome) -> str:
    """One line on what became of a candidate."""
    manifest = outcome.manifest
    if outcome.kind == "held":
        return f"version {outcome.version} (step {manifest.step}) was held back: {outcome.reason}"
    what = "new items only" if outcome.items_only else f"learnt up to {format_time(manifest.watermark)}"
    return (
        f"version {outcome.version} (step {manifest.step}, {manifest.items} items, {what}), "
        f"{sum(outcome.seconds.values()):.1f} s{'' if outcome.items_only else _scores(outcome.scores)}"
    )


def _scores(scores: GateScores | None) -> str:
    if scores is None or scores.candidate is None:
        return ""
    served = "" if scores.served is None else f", served {scores.served:.3f}"
    return f"; loss {scores.candidate:.3f}{served} on {scores.sessions} sessions, {scores.unseen} of them learnt by neither"


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


def versions(repository: RepositoryOption, server: ServerOption = None, json: JsonOption = False) -> None:
    """Every version of a repository: its state, the step and event time that it has learnt up to, its age, and reasons.

    *held* did not pass the release gate, *rejected* was refused by Triton. The state is that of the folders; with
    `--server`, what Triton says of each version is added.

    Example: `onerec versions --repository repository`
    """
    from exporter.client import Client
    from exporter.release import read_hold
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
    if (hold := read_hold(Repository(repository))) is not None:
        out.print(f"publishing is on hold since {format_time(hold.at_ms)} UTC: {hold.reason}; go on: onerec promote "
                  f'--repository {repository} --reason "..."', highlight=False, markup=False, soft_wrap=True)


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
            format_time(info.watermark),
            "-" if info.items is None else str(info.items),
            format_age(None if info.created_ms is None else now - info.created_ms),
            info.reason.partition("\n")[0],
        )
    out.print(table)
