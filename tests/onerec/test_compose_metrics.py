"""Prometheus asks only who answers, and Grafana shows only what there is."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from ruamel.yaml import YAML

from exporter.server import FREE_PORTS, TritonServer
from onerec.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "serving_config"
BOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
FUNCTIONS = {"sum", "max", "rate", "time", "by"}
ECHO = """
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", asked.inputs()[0].as_numpy())]) for asked in requests]
"""
ECHO_CONFIG = """
backend: "python" max_batch_size: 2 dynamic_batching {} instance_group [{ kind: KIND_CPU }]
input [{ name: "x" data_type: TYPE_FP32 dims: [1] }] output [{ name: "y" data_type: TYPE_FP32 dims: [1] }]
"""


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return read(ROOT / "docker-compose.yml")["services"]


@pytest.fixture(scope="module")
def triton_metrics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """Name → labels of what a real Triton with a Python model reports."""
    repository = tmp_path_factory.mktemp("repository")
    (repository / "echo" / "1").mkdir(parents=True)
    (repository / "echo" / "1" / "model.py").write_text(ECHO)
    (repository / "echo" / "config.pbtxt").write_text(ECHO_CONFIG)
    try:
        server = TritonServer(repository, None, ports=FREE_PORTS, log=repository / "triton.log")
    except UserError as error:
        pytest.skip(str(error))
    with server, grpcclient.InferenceServerClient(server.url) as client:
        client.load_model("echo")
        tensor = grpcclient.InferInput("x", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 1), np.float32))
        client.infer("echo", [tensor])
        with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
            text = answer.read().decode()
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    yield found


def expressions(path: Path) -> list[tuple[str, str]]:
    """Expression and legend of every target of a dashboard."""
    board = json.loads(path.read_text(encoding="utf-8"))
    return [(target["expr"], target["legendFormat"]) for panel in board["panels"] for target in panel["targets"]]


def test_prometheus_asks_services_that_answer_there(services: dict[str, Any]) -> None:
    settings = read(FOLDER / "prometheus" / "prometheus.yml")
    assert settings.keys() == {"global", "scrape_configs"}
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in settings["scrape_configs"]}
    assert jobs == {"prometheus": ["127.0.0.1:9090"], "triton": ["triton:8002"]}
    for name in ("triton", "triton-gpu"):
        assert "127.0.0.1:8002:8002" in services[name]["ports"]
        assert services[name]["networks"]["default"]["aliases"] == ["triton"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in services["prometheus"]["command"]
    assert "./serving_config/prometheus:/etc/prometheus:ro" in services["prometheus"]["volumes"]


def test_grafana_finds_prometheus_and_its_dashboards(services: dict[str, Any]) -> None:
    (source,) = read(FOLDER / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
    (provider,) = read(FOLDER / "grafana" / "provisioning" / "dashboards" / "files.yml")["providers"]
    assert f"./serving_config/grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"]) and home.name in {path.name for path in BOARDS}
    for path in BOARDS:
        board = json.loads(path.read_text(encoding="utf-8"))
        assert board["uid"] and board["title"] and board["schemaVersion"]
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        for panel in board["panels"]:
            assert panel["datasource"]["uid"] == source["uid"], panel["title"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {source["uid"]}, panel["title"]
            place = panel["gridPos"]
            assert panel["title"] and panel["description"] and place["x"] + place["w"] <= 24


@pytest.mark.slow
def test_dashboards_ask_for_metrics_and_labels_that_triton_and_the_model_report(triton_metrics: dict[str, set[str]]) -> None:
    own = set(re.findall(r'"(onerec_\w+)"', (FOLDER / "recommend" / "model.py").read_text(encoding="utf-8")))
    assert len(own) >= 4
    known = triton_metrics | {name: {"version"} for name in own} | {"up": {"job"}}
    assert BOARDS
    for expression, legend in (entry for path in BOARDS for entry in expressions(path)):
        names = set(re.findall(r"\b[a-z]\w+\b(?!=)", re.sub(r'"[^"]*"|\[\w+\]|by \(\w+\)', "", expression))) - FUNCTIONS
        assert names and names <= known.keys(), expression
        pairs = re.findall(r"by \((\w+)\)|(\w+)=|\{\{(\w+)\}\}", expression + legend)
        asked = {label for pair in pairs for label in pair if label}
        assert asked <= set().union(*(known[name] for name in names)), f"{expression}: no label {asked}"
