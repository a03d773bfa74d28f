"""For every test: with ONEREC_NO_SKIP=1 a skipped test fails the run, so that CI cannot pass on nothing; and `scrape`."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

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


class Scraped:
    """What a process served: `found(name, **labels)` is the value of that one sample, None where it is absent."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._samples.get((name, frozenset(labels.items())))

    def series(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        """Every sample of a name, by its labels."""
        return {labels: value for (found, labels), value in self._samples.items() if found == name}


@pytest.fixture(scope="session")
def scrape() -> Callable[[str], Scraped]:
    """`scrape("host:port")` → the metrics there, over HTTP."""

    def ask(address: str) -> Scraped:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
            return Scraped(answer.read().decode())

    return ask
