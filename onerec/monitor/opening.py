"""A command's metrics, where its option or its configuration says that they are served."""

from __future__ import annotations

from pathlib import Path

from onerec.config import Config
from onerec.monitor.metrics import Metrics


def open_metrics(process: str, config: Config, port: int | None) -> Metrics:
    """The metrics of `process`, to be used as a context manager.

    `port` is `--metrics-port`, None where it was not given; it wins over `metrics.port`. With neither nothing is served.
    """
    settings = config.metrics
    return Metrics(
        process,
        settings.port if port is None else port,
        host=settings.host,
        folder=Path(settings.folder) if settings.folder else None,
    )
