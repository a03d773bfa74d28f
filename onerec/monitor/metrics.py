"""A process' metrics: made from the one list, served on one port, absent where nothing is known."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter as Counter_
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from onerec.files import sync_path
from onerec.monitor.ages import Ages
from onerec.monitor.families import FAMILIES

disable_created_metrics()

RETRY_SECONDS = 5.0
"""Between two tries to get a port that somebody else holds."""
SENDING_SECONDS = 0.5
"""After a scrape was noticed: its answer is still being written, in a thread that the process' end would cut off."""


class Known(Collector):
    """A gauge's series, only those that have been set: what is not known is absent, never 0."""

    def __init__(self, name: str) -> None:
        family = FAMILIES[name]
        self._gauge = Gauge(name, family.help, family.labels, registry=None)
        self._set = bool(family.labels)

    def set(self, value: float | None, **labels: str) -> None:
        """A new value; None makes the series absent."""
        if labels:
            if value is None:
                self.forget(**labels)
            else:
                self._gauge.labels(**labels).set(value)
        else:
            self._set = value is not None
            self._gauge.set(value or 0.0)

    def forget(self, **labels: str) -> None:
        """Makes a series absent."""
        try:
            self._gauge.remove(*(labels[name] for name in self._gauge._labelnames))  # noqa: SLF001 - no public way by name
        except KeyError:
            pass

    def describe(self) -> Iterable[Metric]:
        """Its name, by which it can be asked for alone."""
        return self._gauge.describe()

    def collect(self) -> Iterable[Metric]:
        """What has been set."""
        return self._gauge.collect() if self._set else ()


class _Negative(Collector):
    """`onerec_negative_ages_total` of the histograms of a process."""

    def __init__(self, ages: list[Ages]) -> None:
        self._ages = ages

    def describe(self) -> Iterable[Metric]:
        name = "onerec_negative_ages_total"
        yield CounterMetricFamily(name, FAMILIES[name].help, labels=("stage",))

    def collect(self) -> Iterable[Metric]:
        (found,) = self.describe()
        assert isinstance(found, CounterMetricFamily)
        totals: Counter_[str] = Counter_()
        for ages in self._ages:
            totals.update(ages.negative)
        for stage, count in totals.items():
            found.add_metric([stage], count)
        yield found


class Metrics:
    """The metrics of one process; a context manager that serves them while it is open.

    `process` is its name (`replay`, `train`, …). Each metric is made from `families.FAMILIES` when first asked for.
    With `port` None nothing is served, and everything still counts. `folder`: where `process`.address is written once
    the port is known, for `onerec run` to find. A port that is taken stops nothing: it is said, and tried again.
    """

    def __init__(
        self,
        process: str,
        port: int | None = None,
        *,
        host: str = "127.0.0.1",
        folder: Path | None = None,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.process = process
        self.registry = CollectorRegistry()
        self.ages = Ages()
        self.scraped_at: float | None = None
        """Monotonic time of the last scrape that came in over HTTP."""
        self.before_scrape: list[Callable[[], None]] = []
        """Called in a thread of the server whenever somebody scrapes: what is looked up then costs nothing in between."""
        self._negative: list[Ages] = []
        self._made: dict[str, Any] = {}
        self._port, self._host, self._folder, self._say = port, host, folder, say
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self._closed = threading.Event()
        self._with_ages(self.ages)
        self.registry.register(_Negative(self._negative))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def _with_ages(self, ages: Ages) -> Ages:
        self.registry.register(ages)
        self._negative.append(ages)
        return ages

    def age_family(self, name: str) -> Ages:
        """A further age histogram with one label, counted in blocks."""
        if name not in self._made:
            self._made[name] = self._with_ages(Ages(name))
        found: Ages = self._made[name]
        return found

    def gauge(self, name: str) -> Known:
        """A gauge, absent until set."""
        if name not in self._made:
            self._made[name] = Known(name)
            self.registry.register(self._made[name])
        found: Known = self._made[name]
        return found

    def counter(self, name: str) -> Counter:
        """A counter; one without labels shows 0 from the start, as there it is known."""
        return self._metric(Counter, name)

    def histogram(self, name: str) -> Histogram:
        """A histogram observed one by one."""
        return self._metric(Histogram, name, buckets=FAMILIES[name].buckets)

    def _metric(self, kind: Any, name: str, **more: Any) -> Any:
        if name not in self._made:
            family = FAMILIES[name]
            self._made[name] = kind(name, family.help, family.labels, registry=self.registry, **more)
        return self._made[name]

    @property
    def address(self) -> str | None:
        """host:port that metrics are served on; None where they are not."""
        return f"{self._host}:{self._server[0].server_port}" if self._server else None

    def __enter__(self) -> Metrics:
        if self._port is not None and not self._start():
            threading.Thread(target=self._try_again, daemon=True).start()
        return self

    def _start(self) -> bool:
        assert self._port is not None
        try:
            self._server = start_http_server(self._port, self._host, registry=_Scraped(self))
        except OSError as error:
            self._say(
                f"{self.process}: metrics cannot be served on {self._host}:{self._port}: {error.strerror}; the work goes on "
                f"without, and the port is tried again every {RETRY_SECONDS:.0f} s. Name another with --metrics-port"
            )
            return False
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            staged = self._folder / f".{self.process}"
            staged.write_text(f"{self.address} {os.getpid()}\n")
            staged.replace(self._folder / f"{self.process}.address")
            sync_path(self._folder)
        return True

    def _try_again(self) -> None:
        said, self._say = self._say, lambda text: None
        while not self._closed.wait(RETRY_SECONDS):
            if self._start():
                said(f"{self.process}: metrics are now served on {self.address}")
                break
        self._say = said

    def wait_for_scrape(self, stopped: Callable[[], bool], seconds: float = 0.1) -> None:
        """Blocks until somebody has scraped after this call began, or `stopped()`: a short replay's figures are not lost."""
        began = time.monotonic()
        while self.address and not stopped() and (self.scraped_at is None or self.scraped_at < began):
            self._closed.wait(seconds)
        if self.scraped_at is not None and self.scraped_at >= began:
            self._closed.wait(SENDING_SECONDS)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join(5)
        if self._folder is not None:
            (self._folder / f"{self.process}.address").unlink(missing_ok=True)


class _Scraped:
    """The registry as the HTTP server sees it: looks things up and notes when it was asked."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        self._asked()
        return self._metrics.registry.collect()

    def restricted_registry(self, names: Iterable[str]) -> Any:
        self._asked()
        return self._metrics.registry.restricted_registry(names)

    def _asked(self) -> None:
        self._metrics.scraped_at = time.monotonic()
        for look in self._metrics.before_scrape:
            look()
