"""Dashboards hold what scripts/grafana.py says, keys that Grafana knows, queries that parse, and metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from ruamel.yaml import YAML

from exporter.server import FREE_PORTS, TritonServer
from onerec.errors import UserError
from onerec.monitor.families import FAMILIES
from onerec.monitor.metrics import Metrics

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "serving_config"
BOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
RULES: dict[str, Any] = YAML(typ="safe").load(FOLDER / "prometheus" / "rules.yml")
LABELS_OF_A_TARGET = {"job", "instance", "process"}
WORDS = {"sum", "max", "min", "rate", "increase", "time", "vector"}
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


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def queries(path: Path) -> list[tuple[str, str]]:
    """Expression and legend of every target of a dashboard."""
    return [(target["expr"], target["legendFormat"]) for panel in read(path)["panels"] for target in panel["targets"]]


def labels_of(expression: str) -> set[str]:
    """Labels that are kept by name in an expression."""
    return {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")} - {"le"}


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


def test_files_are_what_the_script_writes() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "grafana.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{done.stdout}; run scripts/grafana.py"


def kept(wanted: Any, found: Any, place: str = "") -> list[str]:
    """Places of `wanted` that `found` lacks or has otherwise."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [lost for key, value in wanted.items() for lost in kept(value, found.get(key), f"{place}/{key}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = zip(wanted, found, strict=True)
        return [lost for number, (one, other) in enumerate(pairs) for lost in kept(one, other, f"{place}/{number}")]
    return [] if wanted == found else [place]


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_grafana_knows_every_key(path: Path) -> None:
    # Grafana's own types drop a key that they do not know.
    register_default_plugins()
    board = read(path)
    assert kept(board, json.loads(JSONEncoder().encode(Dashboard.from_json(board)))) == []
    board["panels"][0]["gridPosition"] = {}
    assert kept(board, json.loads(JSONEncoder().encode(Dashboard.from_json(board)))) == ["/panels/0/gridPosition"]


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_are_told_apart_and_do_not_overlap(path: Path) -> None:
    board = read(path)
    assert board["uid"] == f"onerec-{path.stem}" and board["tags"] == ["onerec"]
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert panel["title"] and panel["description"] and max(x for x, _ in cells) < 24 and not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_query_parses(tmp_path: Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    found = sorted({query for path in BOARDS for query, _ in queries(path)})
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(found)]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run([program, "check", "rules", "--lint-fatal", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_dashboards_ask_for_metrics_and_labels_that_there_are(triton_metrics: dict[str, set[str]]) -> None:
    suffixes = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    known = {name + suffix: set(family.labels) for name, family in FAMILIES.items() for suffix in suffixes[family.kind]}
    of_model = set(re.findall(r'"(onerec_\w+)"', (FOLDER / "recommend" / "model.py").read_text(encoding="utf-8")))
    assert len(of_model) >= 4
    scraped = Metrics("any").registry.collect()
    of_process: dict[str, set[str]] = {sample.name: set() for metric in scraped for sample in metric.samples}
    recorded = {rule["record"]: labels_of(rule["expr"]) | ({"source"} if "label_replace" in rule["expr"] else set())
                for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
    known |= triton_metrics | {name: {"version"} for name in of_model} | of_process | recorded
    known |= {"up": set(), "ALERTS": {"alertname", "alertstate", "severity"}}
    assert BOARDS
    for expression, legend in (entry for path in BOARDS for entry in queries(path)):
        bare = re.sub(r'"[^"]*"|\[\w+\]|(?:by|on|group_left|group_right) \([^)]*\)|\{[^}]*\}', "", expression)
        names = set(re.findall(r"[a-zA-Z_][\w:]*", bare)) - WORDS
        assert names <= known.keys(), f"{expression}: no metric {names - known.keys()}"
        pairs = re.findall(r"(\w+)=|\{\{(\w+)\}\}", expression + legend)
        asked = labels_of(expression) | {label for pair in pairs for label in pair if label}
        there = set().union(LABELS_OF_A_TARGET, *(known[name] for name in names))
        assert asked <= there, f"{expression}: no label {asked - there}"
