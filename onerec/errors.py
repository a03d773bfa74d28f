"""The two kinds of error that a user sees, with their exit codes."""

from __future__ import annotations


class OneRecError(Exception):
    """Base of every error that ends a command; its text names the fault, the place and the remedy."""

    exit_code = 1


class UserError(OneRecError):
    """The command was asked for something it cannot do: wrong file, option, setting (exit code 2)."""

    exit_code = 2


class Failure(OneRecError):
    """Something outside the user's request broke: disk, server, network (exit code 1)."""

    exit_code = 1
