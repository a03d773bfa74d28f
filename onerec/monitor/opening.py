"""A command's metrics, where its option or its configuration says that they are served, and until when."""

from __future__ import annotations

from pathlib import Path

from onerec.config import Config
from onerec.console import err
from onerec.monitor.metrics import Metrics
from onerec.signals import stopping


def open_metrics(process: str, config: Config, port: int | None) -> Metrics:
    """The metrics of `process` (or of `metrics.name`), to be used as a context manager.

    `port` is `--metrics-port`, None where it was not given; it wins over `metrics.port`. With neither nothing is served.
    """
    settings = config.metrics
    return Metrics(
        settings.name or process,
        settings.port if port is None else port,
        host=settings.host,
        folder=Path(settings.folder) if settings.folder else None,
    )


def linger(metrics: Metrics, config: Config) -> None:
    """Keeps the figures of a job that has ended until somebody took them, or until SIGTERM or Ctrl-C.

    At once where nothing is served, or `metrics.linger` is false.
    """
    if not config.metrics.linger or metrics.address is None:
        return
    with stopping() as stop:
        err.print(
            f"{metrics.process}: done; its metrics stay on http://{metrics.address}/metrics until read once, or Ctrl-C",
            highlight=False, soft_wrap=True,
        )
        metrics.wait_for_scrape(lambda: bool(stop))
