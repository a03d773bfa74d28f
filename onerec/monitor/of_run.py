"""What `onerec run` itself has to say: which of its parts run, and how often each was started again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from onerec.monitor.families import FAMILIES
from onerec.monitor.federation import Federation
from onerec.supervisor import Supervisor

UP, RESTARTS = "onerec_process_up", "onerec_process_restarts_total"


class RunMetrics(Collector):
    """A page for the union; empty but for the process' own figures until it is given its supervisor."""

    def __init__(self) -> None:
        self._supervisor: Supervisor | None = None
        self._federation: Federation | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    @contextlib.contextmanager
    def of(self, supervisor: Supervisor, federation: Federation | None) -> Iterator[None]:
        """Tells of this supervisor, and serves while the block lasts."""
        self._supervisor, self._federation = supervisor, federation
        if federation is None:
            yield
            return
        with federation:
            federation.start()
            yield

    def done(self, name: str) -> bool:
        """Whether the supervisor's job has ended well."""
        return self._supervisor is not None and self._supervisor.done(name)

    def page(self) -> str:
        """The exposition."""
        return generate_latest(self._registry).decode()

    def describe(self) -> Iterable[Metric]:
        """Nothing before the first scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Parts that hang count as down: their process is there and does not answer."""
        if self._supervisor is None:
            return
        silent = self._federation.silent() if self._federation else frozenset()
        up = GaugeMetricFamily(UP, FAMILIES[UP].help, labels=("process",))
        for name, runs in self._supervisor.up().items():
            up.add_metric([name], float(runs and name not in silent))
        yield up
        again = CounterMetricFamily(RESTARTS, FAMILIES[RESTARTS].help, labels=("process",))
        for name, count in self._supervisor.restarts().items():
            again.add_metric([name], count)
        yield again
