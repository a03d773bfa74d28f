"""`onerec dashboard`: the page for people without Grafana."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onerec.console import ConfigOption, RepositoryOption, RunOption, SetOption, StateOption, err


def dashboard(
    state: StateOption,
    run_dir: RunOption,
    repository: RepositoryOption,
    server: Annotated[list[str] | None, typer.Option(help="Triton's gRPC address, host:port; one for each replica. "
                                                          "Default 127.0.0.1:8001.", show_default=False)] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 8050,
    host: Annotated[str, typer.Option(help="Address to listen on. The page has no password.")] = "127.0.0.1",
    metrics: Annotated[str | None, typer.Option(help="Metrics to read lag from, as of `onerec run --metrics-port`; default: "
                                                     "the processes named in RUN/metrics.", show_default=False)] = None,
    names: Annotated[Path | None, typer.Option(help="JSON lines with `item_id` and `title`: what to call items.",
                                               show_default=False)] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """A page that shows how old the knowledge is that users are served from, and what is known beside it, until Ctrl-C.

    It only looks: state, run and repository are never written to. A part that cannot be asked says why.

    Example: `onerec dashboard --state state --run run --repository repository`
    """
    from exporter.client import DEFAULT_URL, grpc_address
    from onerec.config import load_config
    from onerec.dashboard.names import read_titles
    from onerec.dashboard.page import Page, Sources
    from onerec.dashboard.scrape import metrics_url
    from onerec.dashboard.server import bind, serve

    configuration = load_config(config, settings)
    sources = Sources(state=state, run=run_dir, repository=repository,
                      servers=tuple(dict.fromkeys(grpc_address(url) for url in server or [DEFAULT_URL])),
                      metrics=metrics_url(metrics) if metrics else None)
    page = Page(sources, mode=configuration.freshness.clock, objective_s=configuration.freshness.objective_s,
                watch=configuration.monitor, titles=read_titles(names) if names else None)
    listener = bind(host, port)
    shown = f"[{host}]" if ":" in host else host
    err.print(f"dashboard: http://{shown}:{listener.getsockname()[1]}/ (Ctrl-C ends)", highlight=False, markup=False,
              soft_wrap=True)
    serve(page, listener, host)


def register(app: typer.Typer) -> None:
    """Add `dashboard`."""
    app.command()(dashboard)
