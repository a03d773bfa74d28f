"""docker-compose.yml: valid by the Compose schema, and as hardened as the docs say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return YAML(typ="safe").load(FILE)["services"]


def test_is_valid_by_the_compose_schema(tmp_path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*check, str(FILE)], capture_output=True).returncode == 0
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(FILE.read_text().replace("volumes:", "volume:"))
    assert subprocess.run([*check, str(broken)], capture_output=True).returncode == 1


def test_one_triton_a_profile_and_the_cpu_one_by_default(services: dict[str, Any]) -> None:
    profiles = {name: service["profiles"] for name, service in services.items() if "profiles" in service}
    assert profiles == {"triton": ["cpu"], "triton-gpu": ["gpu"]}
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text()
    devices = services["triton-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]
    assert "reservations" not in services["triton"]["deploy"]["resources"]


def test_every_service_has_limits_and_only_the_preparing_one_is_root(services: dict[str, Any]) -> None:
    for name, service in services.items():
        limits = service["deploy"]["resources"]["limits"]
        assert limits["cpus"] and limits["memory"], name
        assert name == "prepare" or service["user"] == "10001:10001"


def test_triton_reads_only_and_is_healthy_when_the_model_is(services: dict[str, Any]) -> None:
    for name in ("triton", "triton-gpu"):
        assert all(volume.endswith(":ro") for volume in services[name]["volumes"])
        assert "/v2/models/recommend/ready" in " ".join(services[name]["healthcheck"]["test"])
        assert services[name]["environment"]["ONEREC_STATE"] == "/data/state"


def test_ports_are_open_on_this_host_only(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_the_image_holds_every_package(services: dict[str, Any]) -> None:
    copied = set(re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "build"}
    assert packages <= copied
