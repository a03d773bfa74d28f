"""Prometheus asks every process that serves metrics, and Grafana finds Prometheus and the dashboards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from onerec.config import load_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "serving_config"
DONE_AFTER_A_WHILE = {"prepare", "topics", "topics-cluster", "simulate", "produce"}
WITHOUT_METRICS = {"dashboard"}


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return read(ROOT / "docker-compose.yml")["services"]


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    return {job["job_name"]: job for job in read(FOLDER / "prometheus" / "prometheus.yml")["scrape_configs"]}


def test_prometheus_asks_every_process_at_the_port_that_it_serves(services: dict[str, Any], jobs: dict[str, Any]) -> None:
    assert jobs.keys() == {"prometheus", "triton", "onerec"}
    (asked,) = jobs["onerec"]["dns_sd_configs"]
    stays = {name for name, service in services.items() if service["image"] == "onerec-stream:latest"}
    assert set(asked["names"]) == stays - DONE_AFTER_A_WHILE - WITHOUT_METRICS
    metrics = load_config(FOLDER / "onerec.toml").metrics
    assert (asked["type"], asked["port"], metrics.host) == ("A", metrics.port, "0.0.0.0")
    assert metrics.linger is False, "a container that is done would wait for a scrape that may never come"
    assert jobs["onerec"]["relabel_configs"] == [{"source_labels": ["__meta_dns_name"], "target_label": "job"}]
    for name in asked["names"]:
        assert "9100" not in str(services[name].get("ports", "")), f"{name}: metrics stay within the network"


def test_prometheus_asks_triton_and_itself(services: dict[str, Any], jobs: dict[str, Any]) -> None:
    assert jobs["prometheus"]["static_configs"] == [{"targets": ["127.0.0.1:9090"]}]
    assert jobs["triton"]["static_configs"] == [{"targets": ["triton:8002"]}]
    for name in ("triton", "triton-gpu"):
        assert "127.0.0.1:8002:8002" in services[name]["ports"]
        assert services[name]["networks"]["default"]["aliases"] == ["triton"]


def test_prometheus_has_its_rules(services: dict[str, Any]) -> None:
    assert "--config.file=/etc/prometheus/prometheus.yml" in services["prometheus"]["command"]
    assert "./serving_config/prometheus:/etc/prometheus:ro" in services["prometheus"]["volumes"]
    for name in ("prometheus.yml", "one-machine.yml"):
        assert read(FOLDER / "prometheus" / name)["rule_files"] == ["rules.yml"]
    assert (FOLDER / "prometheus" / "rules.yml").is_file()


def test_grafana_finds_prometheus_and_its_dashboards(services: dict[str, Any]) -> None:
    (source,) = read(FOLDER / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
    assert source["jsonData"]["manageAlerts"] is True, "the rules of Prometheus are to be seen in Grafana"
    (provider,) = read(FOLDER / "grafana" / "provisioning" / "dashboards" / "files.yml")["providers"]
    assert f"./serving_config/grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    boards = {path.name for path in (FOLDER / "grafana" / "dashboards").glob("*.json")}
    assert boards == {"freshness.json", "training.json", "stream.json", "serving.json"}
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"]) and home.name == "freshness.json"
    for name in boards:
        text = (FOLDER / "grafana" / "dashboards" / name).read_text(encoding="utf-8")
        assert text.count('"uid": "' + source["uid"] + '"') == text.count('"type": "prometheus"') > 0
