"""Metrics of a process: absent until known, served on a port, and no reason to stop working where the port is taken."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onerec.config import Config, load_config
from onerec.monitor import metrics as metrics_module
from onerec.monitor.families import FAMILIES
from onerec.monitor.metrics import Metrics
from onerec.monitor.opening import linger, open_metrics

Scrape = Callable[[str], Any]


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def address(metrics: Metrics) -> str:
    assert metrics.address is not None
    return metrics.address


def test_every_family_can_be_made_and_is_named_as_prometheus_wants_it() -> None:
    metrics = Metrics("test")
    for name, family in FAMILIES.items():
        if family.kind == "gauge":
            metrics.gauge(name)
        elif family.kind == "counter":
            assert name.endswith("_total")
            # This one is what histograms count below zero.
            assert name == "onerec_negative_ages_total" or metrics.counter(name)
        else:
            assert name.endswith("_seconds") and list(family.buckets) == sorted(family.buckets)
            if "age_seconds" not in name:
                metrics.histogram(name)
    metrics.age_family("onerec_pair_age_seconds")


def test_what_is_not_known_is_absent_never_zero(scrape: Scrape) -> None:
    with Metrics("test", 0) as metrics:
        gauge = metrics.gauge("onerec_users")
        labelled = metrics.gauge("onerec_lag_offsets")
        assert scrape(address(metrics))("onerec_users") is None
        gauge.set(0)
        labelled.set(3, source="events", partition="1")
        found = scrape(address(metrics))
        assert found("onerec_users") == 0
        assert found("onerec_lag_offsets", source="events", partition="1") == 3
        gauge.set(None)
        labelled.set(None, source="events", partition="1")
        labelled.forget(source="events", partition="7")
        found = scrape(address(metrics))
        assert found("onerec_users") is None and not found.series("onerec_lag_offsets")
        assert not found.series("onerec_age_seconds_count")


def test_ages_of_all_histograms_below_zero_are_counted(scrape: Scrape) -> None:
    with Metrics("test", 0) as metrics:
        metrics.ages.observe("history", 1_000, [2_000, 500])
        metrics.age_family("onerec_pair_age_seconds").observe("pair", 1_000, [3_000, 4_000])
        found = scrape(address(metrics))
    assert found("onerec_negative_ages_total", stage="history") == 1
    assert found("onerec_negative_ages_total", stage="pair") == 2
    assert found("onerec_age_seconds_count", stage="history") == 1


def test_what_is_looked_up_when_somebody_scrapes_is_in_that_answer(scrape: Scrape) -> None:
    with Metrics("test", 0) as metrics:
        looks = []
        metrics.before_scrape.append(lambda: looks.append(1))
        metrics.before_scrape.append(lambda: metrics.gauge("onerec_users").set(len(looks)))
        assert [scrape(address(metrics))("onerec_users") for _ in range(2)] == [1, 2]


def test_a_port_in_use_is_said_and_taken_once_it_is_free(monkeypatch: pytest.MonkeyPatch, scrape: Scrape) -> None:
    monkeypatch.setattr(metrics_module, "RETRY_SECONDS", 0.05)
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with Metrics("replay", port, say=said.append) as metrics:
            metrics.gauge("onerec_users").set(7)
            assert metrics.address is None
            assert len(said) == 1 and str(port) in said[0] and "--metrics-port" in said[0]
            # Whoever waits for a scrape that cannot come does not wait.
            metrics.wait_for_scrape(lambda: False)
            other.close()
            until(lambda: metrics.address is not None)
            assert scrape(f"127.0.0.1:{port}")("onerec_users") == 7
    assert len(said) == 2 and "now served" in said[1]


def test_the_address_stands_in_a_file_while_it_is_served(tmp_path: Path) -> None:
    config = load_config(None, ["metrics.port=0", f"metrics.folder={tmp_path / 'metrics'}", "metrics.name=stream-2"])
    with open_metrics("stream", config, None) as metrics:
        path = tmp_path / "metrics" / "stream-2.address"
        assert path.read_text().split()[0] == address(metrics)
    assert not path.exists()


def test_the_option_wins_over_the_configuration_and_with_neither_nothing_is_served() -> None:
    with open_metrics("replay", Config(), None) as metrics:
        assert metrics.address is None
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = load_config(None, [f"metrics.port={other.getsockname()[1]}"])
        with open_metrics("replay", taken, 0) as metrics:
            assert metrics.address is not None


def test_a_job_that_has_ended_stays_up_until_it_was_scraped_after_its_end(scrape: Scrape) -> None:
    with open_metrics("replay", Config(), 0) as metrics:
        scrape(address(metrics))
        done = threading.Event()

        def wait() -> None:
            metrics.wait_for_scrape(lambda: False)
            done.set()

        threading.Thread(target=wait, daemon=True).start()
        assert not done.wait(0.3)
        scrape(address(metrics))
        assert done.wait(30)


def test_a_job_that_has_ended_goes_when_it_is_told_to_or_must_not_stay() -> None:
    with open_metrics("replay", Config(), 0) as metrics:
        metrics.wait_for_scrape(lambda: True)
        linger(metrics, load_config(None, ["metrics.linger=false"]))
    with open_metrics("replay", Config(), None) as metrics:
        linger(metrics, Config())


def test_one_family_can_be_asked_for_alone() -> None:
    with Metrics("test", 0) as metrics:
        metrics.gauge("onerec_users").set(1)
        metrics.gauge("onerec_open_sessions").set(2)
        metrics.ages.observe("history", 1_000, [500])
        names = "name[]=onerec_users&name[]=onerec_age_seconds_count"
        with urllib.request.urlopen(f"http://{address(metrics)}/metrics?{names}", timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
        assert sorted(lines) == ['onerec_age_seconds_count{stage="history"} 1.0', "onerec_users 1.0"]
        assert metrics.scraped_at is not None
