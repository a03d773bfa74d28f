"""docker-compose.yml: valid by the Compose schema, as hardened as the docs say, and no command that does not exist."""

from __future__ import annotations

import json
import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
from ruamel.yaml import YAML

from onerec.cli import build
from onerec.config import load_config
from streaming.kafka.broker import VERSION

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
WAYS_IN = {"kafka", "cluster", "external", "embedded"}
TRITONS = {"cpu", "gpu"}
ONE_SHOTS = {"prepare", "topics", "topics-cluster", "simulate", "produce"}
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+):-([^}]*)\}")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return YAML(typ="safe").load(FILE)


@pytest.fixture(scope="module")
def services(document: dict[str, Any]) -> dict[str, Any]:
    return document["services"]


def in_shell(text: str) -> str:
    """A string of the file as the container gets it: defaults filled in, doubled dollars single."""
    return VARIABLE.sub(r"\2", text).replace("$$", "$")


def onerec_calls(service: dict[str, Any]) -> list[list[str]]:
    """Arguments of every call of `onerec` in a service's command and health check."""
    command = [in_shell(word) for word in service.get("command", [])]
    check = service.get("healthcheck", {}).get("test", [])
    calls = [[in_shell(word) for word in check[2:]]] if check[:2] == ["CMD", "onerec"] else []
    if service.get("image") == "onerec-stream:latest" and "entrypoint" not in service:
        return [*calls, command]
    for words in re.findall(r"\bonerec ([^\n;|)&]+)", "\n".join(command).replace("\\\n", "")):
        calls.append(shlex.split(re.sub(r"\$\w+", "value", words)))
    return calls


def test_is_valid_by_the_compose_schema(document: dict[str, Any]) -> None:
    # Read as a file: the program around it depends on a newer click than the stream engine allows.
    place = metadata.distribution("check-jsonschema").locate_file("check_jsonschema/builtin_schemas/vendor/compose-spec.json")
    schema = json.loads(Path(str(place)).read_text(encoding="utf-8"))
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError, match="volume"):
        jsonschema.validate(document | {"volume": {}}, schema)


def test_each_way_in_and_each_triton_is_a_profile(services: dict[str, Any]) -> None:
    def started(*profiles: str) -> set[str]:
        return {name for name, service in services.items() if set(service.get("profiles", profiles)) & set(profiles)}

    always = {"prepare", "prometheus", "grafana", "dashboard"}
    pipeline = {"ingest", "stream", "feed", "train", "sampler", "pairs-replica", "publish", "histories-replica", "monitor"}
    assert started("kafka", "cpu") == always | pipeline | {"kafka", "topics", "triton"}
    assert started("cluster", "gpu") == always | pipeline | {"kafka-1", "kafka-2", "kafka-3", "topics-cluster", "triton-gpu"}
    assert started("external", "cpu") == always | pipeline | {"topics", "triton"}
    assert started("embedded", "cpu") == always | {"embedded", "triton"}
    (chosen,) = re.findall(r"^COMPOSE_PROFILES=(\w+),(\w+)$", (ROOT / ".env").read_text(), re.MULTILINE)
    assert chosen[0] in WAYS_IN and chosen[1] in TRITONS
    devices = services["triton-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]
    assert "reservations" not in services["triton"]["deploy"]["resources"]


def test_every_service_is_limited_and_only_the_preparing_one_is_root(services: dict[str, Any]) -> None:
    for name, service in services.items():
        limits = service["deploy"]["resources"]["limits"]
        assert limits["cpus"] and limits["memory"], name
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["logging"]["options"]["max-size"], name
        assert name == "prepare" or service["user"] in ("10001:10001", "appuser", "nobody", "grafana"), name
        # Whoever runs as 10001 writes where the image or `prepare` made it the owner.
        assert ":" in service["image"] and (service["image"].startswith("onerec-") or not service["image"].endswith("latest"))
    prepared = set(services["prepare"]["command"][2:])
    for name, service in services.items():
        targets = {volume.split(":")[1] for volume in service.get("volumes", []) if re.match(r"\w", volume)}
        assert {target for target in targets if target.startswith("/data/")} <= prepared, name


def test_what_stays_up_is_restarted_and_watched(services: dict[str, Any]) -> None:
    for name in services.keys() - ONE_SHOTS:
        assert services[name]["restart"] == "unless-stopped", name
        assert name == "train" or services[name]["healthcheck"]["test"], name


def test_every_onerec_command_line_is_one_that_onerec_takes(services: dict[str, Any]) -> None:
    group = typer.main.get_command(build())
    seen = set()
    for name, service in services.items():
        for words in onerec_calls(service):
            # Parses only: an unknown command or option, a wrong type or a missing value is an error.
            command = group.commands[words[0]]  # type: ignore[attr-defined]
            command.make_context(words[0], words[1:], parent=group.make_context("onerec", [words[0]]))
            seen.add((name, words[0]))
    assert {
        ("topics", "topics"), ("ingest", "ingest"), ("stream", "stream"), ("feed", "feed"), ("feed", "sessions"),
        ("train", "train"), ("train", "sessions"), ("publish", "publish"), ("histories-replica", "histories-replica"),
        ("produce", "produce"), ("simulate", "simulate"), ("embedded", "run"), ("sampler", "sampler"),
        ("pairs-replica", "pairs-replica"), ("monitor", "monitor"), ("dashboard", "dashboard"),
    } <= seen


def test_every_variable_has_a_default(services: dict[str, Any]) -> None:
    text = "\n".join(line for line in FILE.read_text().splitlines() if not line.lstrip().startswith("#")).replace("$$", "")
    assert len(VARIABLE.findall(text)) == text.count("$")


def test_names_that_services_use_exist(document: dict[str, Any], services: dict[str, Any]) -> None:
    used = set()
    for name, service in services.items():
        profiles = set(service.get("profiles", WAYS_IN | TRITONS | {"produce"}))
        needs = service.get("depends_on", {})
        for other, how in needs.items() if isinstance(needs, dict) else [(other, {}) for other in needs]:
            always = profiles <= set(services[other].get("profiles", profiles))
            assert always or how.get("required") is False, f"{name} needs {other}, which another profile starts"
        for volume in service.get("volumes", []):
            source, colon, _ = in_shell(volume).partition(":")
            if colon and source.startswith("./"):
                assert source == "./logs" or (ROOT / source).exists(), f"{name}: {source}"
            elif colon:
                used.add(source)
    assert used == document["volumes"].keys()


def test_one_file_holds_the_settings_of_all_and_is_one_that_onerec_takes(services: dict[str, Any]) -> None:
    assert load_config(ROOT / "serving_config" / "onerec.toml").kafka.bootstrap == "kafka:9092"
    for name, service in services.items():
        for words in onerec_calls(service):
            if words[0] in ("sessions", "histories", "versions", "simulate"):
                continue
            assert "--config=/etc/onerec.toml" in words or "--config /etc/onerec.toml" in " ".join(words), name
            assert any(volume.endswith(":/etc/onerec.toml:ro") for volume in service["volumes"]), name


def test_triton_reads_only_and_is_healthy_when_the_model_is(services: dict[str, Any]) -> None:
    for name in ("triton", "triton-gpu"):
        assert all(volume.endswith(":ro") for volume in services[name]["volumes"])
        assert "/v2/models/recommend/ready" in " ".join(services[name]["healthcheck"]["test"])
        histories = in_shell(services[name]["environment"]["ONEREC_STATE"])
        assert f"--state={histories}" in services["histories-replica"]["command"]
        assert f"--state={histories}" in [in_shell(word) for word in services["dashboard"]["command"]]


def test_who_only_looks_cannot_write(services: dict[str, Any]) -> None:
    assert all(volume.endswith(":ro") for volume in services["dashboard"]["volumes"])
    # The monitor's ledger is in the run.
    assert [volume for volume in services["monitor"]["volumes"] if not volume.endswith(":ro")] == ["run:/data/run"]


def test_workers_share_no_state(services: dict[str, Any]) -> None:
    assert "/data/state" in services["stream"]["volumes"], "a named volume would be shared by all `--scale`d workers"
    assert "container_name" not in services["stream"]


def test_ports_are_open_on_this_host_only(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_containers_run_the_kafka_that_the_tests_run(services: dict[str, Any]) -> None:
    brokers = {name for name, service in services.items() if service["image"].startswith("apache/kafka")}
    assert brokers == {"kafka", "kafka-1", "kafka-2", "kafka-3"}
    assert {services[name]["image"] for name in brokers} == {f"apache/kafka:{VERSION}"}


def test_the_images_are_stages_of_one_file_and_hold_every_package(services: dict[str, Any]) -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE))
    assert {service["build"]["target"] for service in services.values() if "build" in service} == stages
    copied = set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE))
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "build"}
    assert packages <= copied
