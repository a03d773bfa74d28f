"""Prometheus' own tool says that the files are sound, and that every alert fires after its time and clears."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML

from onerec.monitor.families import FAMILIES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "serving_config" / "prometheus"
RULES: dict[str, Any] = YAML(typ="safe").load(FOLDER / "rules.yml")
(GROUP,) = RULES["groups"]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in GROUP["rules"] if "alert" in rule}

OBJECTIVE = {"onerec_freshness_objective_seconds": "30+0x90"}
INTERVAL = {"onerec_publish_interval_seconds": "30+0x90"}


class Case(NamedTuple):
    """A fault as series, a value a minute; `fires` and `clears` are minutes; `quiet`: minutes at which nothing fires."""

    alert: str
    series: dict[str, str]
    fires: str
    summary: str
    clears: str
    labels: dict[str, str] = {}
    quiet: tuple[str, ...] = ("3m",)


CASES = [
    # Sound for five minutes, then 70 s old, sound again from the 20th minute on.
    Case("OneRecStale", {'onerec_freshness_seconds{replica="a:8001"}': "20+0x5 70+0x14 20+0x20", **OBJECTIVE}, "7m",
         "a:8001 answers from knowledge that is 1m 10s old", "21m", {"replica": "a:8001"}, ("5m", "6m")),
    # A replay of 600 s of log a second: 5 hours of log are the objective.
    Case("OneRecStale", {'onerec_freshness_seconds{replica="a:8001"}': "17000+0x5 19000+0x14 17000+0x20",
                         "onerec_log_factor": "600+0x60", **OBJECTIVE}, "7m",
         "a:8001 answers from knowledge that is 5h 16m 40s old", "21m", {"replica": "a:8001"}, ("5m",)),
    # Published at 4 min for the last time until 10 min; 90 s are allowed.
    Case("OneRecNoNewVersion", {"onerec_publish_timestamp_seconds": "0+60x4 240+0x5 600+60x20",
                                'onerec_sessions_total{quality="high"}': "0+60x90", **INTERVAL}, "7m",
         "no new version for 3m 0s", "11m", quiet=("4m", "5m")),
    # The publisher is gone: its last word counts on.
    Case("OneRecNoNewVersion", {"onerec_publish_timestamp_seconds": "0+60x4 _x6 660+60x20", "onerec_publish_interval_seconds":
                                "30+0x4 _x6 30+0x20", 'onerec_sessions_total{quality="high"}': "0+60x90"}, "8m",
         "no new version for 4m 0s", "12m", quiet=("4m", "5m")),
    Case("OneRecServedBehindTrained", {'onerec_watermark_seconds{stage="trained"}': "0+60x40",
                                       'onerec_watermark_seconds{stage="answered"}': "0+60x5 300+0x9 900+60x20", **INTERVAL},
         "9m", "served 4m 0s behind what is trained", "16m", quiet=("5m", "6m")),
    Case("OneRecMixedVersions", {'onerec_replica_version{replica="a:8001"}': "1+1x5 6+0x40",
                                 'onerec_replica_version{replica="b:8001"}': "1+1x3 4+0x9 6+0x20"}, "7m",
         "replicas answer with versions that are 2 apart", "15m"),
    # As fast as the log goes on, then half as fast again for 20 minutes, then it catches up.
    Case("OneRecLagRising", {'onerec_lag_seconds{source="events"}': "1+0x10 1+30x20 601-60x10 1+0x40"}, "27m",
         "events falls behind by 0.50 s every second", "40m", {"source": "events"}, ("10m", "15m")),
    # Nobody says the lag, as the stream is dead: the monitor sees the histories stand still.
    Case("OneRecLagRising", {"onerec_log_clock_seconds": "1000+60x70",
                             'onerec_watermark_seconds{stage="history"}': "995+60x10 1595+0x20 2855+60x40"}, "27m",
         "histories falls behind by 1.00 s every second", "50m", {"source": "histories"}, ("10m", "14m")),
    Case("OneRecDeadLetters", {'onerec_dead_letters_total{reason="bad_json",job="ingest"}': "0+0x5 0+12x10 120+0x30",
                               'onerec_events_total{job="ingest"}': "0+5988x60",
                               'onerec_events_total{job="stream"}': "0+59880x60"}, "15m",
         "0.2% of the lines are refused", "22m", {"job": "ingest"}, ("5m", "60m")),
    Case("OneRecDrift", {'onerec_drift_psi{feature="codes"}': "0.1+0x5 0.25+0x15 0.1+0x10"}, "11m",
         "codes has drifted: population stability index 0.25", "22m", {"feature": "codes"}, ("5m", "10m")),
    Case("OneRecGateFailed", {"onerec_gate_failed": "0+0x4 1+0x9 0+0x9"}, "6m",
         "1 candidate is held back by the release gate", "15m"),
    Case("OneRecPublishingOnHold", {"onerec_publishing_on_hold": "0+0x4 1+0x9 0+0x9"}, "6m",
         "publishing is on hold (1)", "15m"),
    Case("OneRecProcessDown", {'up{job="stream",instance="a"}': "1+0x40",
                               'up{job="stream",instance="b"}': "1+0x5 0+0x9 1+0x20"}, "8m",
         "1 of stream is down", "16m", {"job": "stream"}),
    # A dead container has no name any more, and so no target.
    Case("OneRecProcessDown", {'up{job="train",instance="a"}': "1+0x5 stale _x10 1+0x20"}, "12m", "1 of train is down", "18m",
         {"job": "train"}),
    Case("OneRecProcessDown", {'onerec_process_up{job="onerec",process="train"}': "1+0x5 0+0x9 1+0x20"}, "8m",
         "1 of train is down", "16m", {"job": "onerec", "process": "train"}),
    Case("OneRecReplicaDown", {'onerec_replica_up{replica="a:8001"}': "1+0x5 0+0x9 1+0x20"}, "8m",
         "1 replica down: a:8001 does not answer", "16m", {"replica": "a:8001"}),
    Case("OneRecSkippedSteps", {"onerec_skipped_steps_total": "0+0x5 2+0x30"}, "8m",
         "2 steps of the trainer skipped within 10 minutes", "17m"),
]


def promtool(*arguments: str | Path) -> None:
    """Fails with what the tool says."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def unit_tests(cases: list[Case]) -> dict[str, Any]:
    """Of Prometheus' form, https://prometheus.io/docs/prometheus/latest/configuration/unit_testing_rules."""
    tests = []
    for case in cases:
        rule = ALERTS[case.alert]
        annotations = {**rule["annotations"], "summary": case.summary}
        fired = {"exp_labels": {**rule["labels"], **case.labels}, "exp_annotations": annotations}
        asked = {case.fires: [fired], **{minute: [] for minute in (*case.quiet, case.clears)}}
        tests.append({
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
            "alert_rule_test": [{"eval_time": minute, "alertname": case.alert, "exp_alerts": alerts}
                                for minute, alerts in asked.items()],
        })
    return {"rule_files": [str(FOLDER / "rules.yml")], "evaluation_interval": "30s", "tests": tests}


def test_files_are_sound() -> None:
    promtool("check", "rules", "--lint-fatal", FOLDER / "rules.yml")
    for name in ("prometheus.yml", "one-machine.yml"):
        promtool("check", "config", FOLDER / name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_fires_after_its_time_and_clears(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "rules_test.yml"
    path.write_text(json.dumps(unit_tests([case])))
    promtool("test", "rules", path)


def test_every_alert_is_tried_and_has_its_section_in_the_runbook() -> None:
    assert {case.alert for case in CASES} == ALERTS.keys()
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sections == list(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{name.lower()}"
        assert "$value" in rule["annotations"]["summary"], f"{name} does not name the figure"


def test_rules_name_metrics_that_there_are() -> None:
    suffixes = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    known = {name + suffix for name, family in FAMILIES.items() for suffix in suffixes[family.kind]}
    recorded: set[str] = set()
    for rule in GROUP["rules"]:
        assert set(re.findall(r"(?<![:\w])onerec_\w+(?![:\w])", rule["expr"])) <= known, rule
        # Of rules above: those below have an older value.
        assert set(re.findall(r"\w+:\w+(?::\w+)?", rule["expr"])) <= recorded, rule
        recorded.add(rule.get("record"))
