"""What all commands share: options, JSON or human output, and errors turned into exit codes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file with settings.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting as section.key=value; may be repeated, wins over the file.",
                 show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text.")]
StateOption = Annotated[Path, typer.Option("--state", help="Folder of the stream's state.")]
BootstrapOption = Annotated[
    str | None,
    typer.Option("--bootstrap", help="Kafka brokers, host:port[,host:port]; default kafka.bootstrap.", show_default=False),
]
RunOption = Annotated[Path, typer.Option("--run", help="Folder of a training run.")]
MetricsPortOption = Annotated[
    int | None,
    typer.Option("--metrics-port", min=0, max=65535, show_default=False,
                 help="Serve Prometheus metrics on this port; 0 for a free one. Default metrics.port, else nowhere."),
]
RepositoryOption = Annotated[Path, typer.Option("--repository", help="Folder of the Triton model repository.")]

out = Console()
err = Console(stderr=True)


def print_json(value: Any) -> None:
    """One compact JSON line on standard output, UTF-8 unescaped, keys in their order."""
    sys.stdout.buffer.write(orjson.dumps(value) + b"\n")
    sys.stdout.buffer.flush()
