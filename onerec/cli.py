"""The command `onerec`: parse, call, report; every rule lives elsewhere."""

from __future__ import annotations

import importlib
import os
import sys

import typer

from onerec.errors import OneRecError

app = typer.Typer(
    name="onerec",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Event logs in, sessions of videos out of Triton, learning without end.",
)

COMMAND_MODULES = (
    "simulate", "stream", "items", "train", "publish", "releases", "serve", "run", "status", "broker", "produce", "ingest",
    "worker", "feed", "sampler", "sequences", "reinforce", "table", "evaluate", "reward", "dashboard", "monitor",
)
"""Modules of `onerec.commands`, in the order of `--help`; each has `register(app)`."""


def build() -> typer.Typer:
    """The application with every command registered."""
    for name in COMMAND_MODULES:
        importlib.import_module(f"onerec.commands.{name}").register(app)
    return app


def main() -> None:
    """Entry point: errors of ours become one line on standard error and their exit code."""
    try:
        build()()
    except OneRecError as error:
        sys.stderr.write(f"onerec: {error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
