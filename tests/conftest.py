"""Hooks for every test: with ONEREC_NO_SKIP=1 a skipped test fails the run, so that CI cannot pass on nothing."""

from __future__ import annotations

import os

import pytest

# Spinning OpenMP threads make everything crawl where the tests share their cores; see trainer/__init__.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _skipped(config: pytest.Config) -> int:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return len(reporter.stats.get("skipped", [])) if reporter else 0


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn a run that skipped something into a failed one where skips are forbidden."""
    if os.environ.get("ONEREC_NO_SKIP") == "1" and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why a run without a failed test fails."""
    if os.environ.get("ONEREC_NO_SKIP") == "1" and _skipped(terminalreporter.config):
        terminalreporter.write_line("ONEREC_NO_SKIP=1: skipped tests count as failed", red=True)
