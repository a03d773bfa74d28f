"""Writes the Grafana dashboards from the tables below: `python scripts/grafana.py`; with --check it only says what differs.

A panel is its title, what it shows, and queries with legends; place, ids and the many keys Grafana wants are the same for all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

FOLDER: Final = Path(__file__).parents[1] / "serving_config" / "grafana" / "dashboards"
SOURCE: Final = {"type": "prometheus", "uid": "prometheus"}
COLUMNS: Final = 24


class Panel(NamedTuple):
    """`queries`: PromQL and legend. `names`: text and colour of the values 0 and 1. A `stat` is 4 wide, the rest 12."""

    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    names: tuple[tuple[str, str], ...] = ()
    width: int = 0


def stat(title: str, description: str, query: str, unit: str = "short", **more: Any) -> Panel:
    """One figure."""
    return Panel(title, description, ((query, more.pop("legend", "")),), unit, "stat", **more)


FRESHNESS: Final = (
    stat("Event → answer", "The log's clock minus what the oldest replica's answer has learnt up to.",
         "max(onerec_freshness_seconds)", "s"),
    stat("Objective", "freshness.objective_s, in seconds of log; above it OneRecStale fires.", "onerec:objective_seconds", "s"),
    stat("Seconds of log a second", "1 in live time; more in a replay.", "max(onerec_log_factor)"),
    stat("Last version", "Since something newly learnt was given to Triton.", "time() - onerec:last_publish_seconds", "s"),
    stat("Release gate", "Whether the newest candidate was held back.", "max(onerec_gate_failed)", names=(
        ("passed", "green"), ("held back", "red"))),
    stat("Publishing", "On hold after a rollback until `onerec promote`.", "max(onerec_publishing_on_hold)", names=(
        ("goes on", "green"), ("on hold", "orange"))),
    Panel("Firing", "Alerts that fire now; docs/alerts.md says what to do.",
          (('ALERTS{alertstate="firing"}', ""),), kind="table", width=COLUMNS),
    Panel("Event → answer, by replica", "The headline, asked from each replica, never taken from what was pushed.",
          (("max by (replica) (onerec_freshness_seconds)", "{{replica}}"), ("onerec:objective_seconds", "objective")), "s"),
    Panel("Versions", "What each replica answers with, and the newest given to Triton. Lines apart: mixed versions.",
          (("max by (replica) (onerec_replica_version)", "{{replica}}"), ("max(onerec_published_version)", "published"))),
    Panel("Chain, p95", "Age of an event when it gets to each hand-off. The space between two lines: that hand-off.",
          (("stage:onerec_age_seconds:p95", "{{stage}}"), ("onerec:objective_seconds", "objective")), "s"),
    Panel("Chain, p50", "The same for the middle event.", (("stage:onerec_age_seconds:p50", "{{stage}}"),), "s"),
    Panel("Watermarks behind the log's clock", "How far each stage is behind now. It grows while a stage stands still.",
          (("max(onerec_log_clock_seconds) - on () group_right () max by (stage) (onerec_watermark_seconds)", "{{stage}}"),),
          "s"),
    Panel("New items and histories, p95",
          "Age of a new item at the first answer that could contain it; of the newest event in histories that an answer uses.",
          (("replica:onerec_new_item_age_seconds:p95", "new item, {{replica}}"),
           ("replica:onerec_history_used_age_seconds:p95", "history used, {{replica}}")), "s"),
    Panel("Candidates", "Published, held back by the gate, failed; in 5 minutes.",
          (("sum by (outcome) (increase(onerec_publishes_total[5m]))", "{{outcome}}"),)),
    Panel("Scores at the gate", "Mean loss per code on the newest sessions; lower is better.",
          (("max by (model) (onerec_gate_score)", "{{model}}"),)),
    Panel("Steps of a publish, p95", "Where a publish spends its time.",
          (("step:onerec_publish_seconds:p95", "{{step}}"),), "s"),
    Panel("Clocks", "Ages below zero: events ahead of the clock. Jumps: the wall clock against the monotonic one.",
          (("sum by (stage) (rate(onerec_negative_ages_total[5m]))", "ahead of the clock a second, {{stage}}"),
           ("sum(increase(onerec_clock_jumps_total[5m]))", "jumps in 5 minutes"))),
)

TRAINING: Final = (
    stat("Step", "Of the newest checkpoint.", "max(onerec_checkpoint_step)"),
    stat("Age of the checkpoint", "By the wall clock.", "time() - max(onerec_checkpoint_timestamp_seconds)", "s"),
    stat("Skipped steps", "In an hour: a loss or gradient was not finite.", "sum(increase(onerec_skipped_steps_total[1h]))"),
    stat("Preference steps", "Share of steps that learnt preference pairs too.",
         "sum(rate(onerec_preference_steps_total[5m])) / sum(rate(onerec_train_steps_total[5m]))", "percentunit"),
    stat("Pairs unread", "Made by the sampler, not yet taken by the trainer.", "sum(onerec_pairs_unread)"),
    stat("Sampler behind", "Checkpoints between its snapshot and the newest.", "max(onerec_sampler_versions_behind)"),
    Panel("Losses", "Of the newest step, by objective.", (("max by (objective) (onerec_loss)", "{{objective}}"),)),
    Panel("Test-then-train hit rate", "Each window is scored before it is learnt; over the newest windows.",
          (("max by (model) (onerec_hit_rate)", "{{model}}"),), "percentunit"),
    Panel("Hit rate by hour of the day", "Event time, since the trainer began.",
          (("sum by (hour, model) (onerec_hits_total) / on (hour) group_left () sum by (hour) (onerec_scored_total)",
            "{{hour}} {{model}}"),), "percentunit", "bargauge"),
    Panel("Hit rate of versions", "Right after the newest checkpoint that another has followed, and after the one before it.",
          (("max by (which) (onerec_version_hit_rate)", "{{which}}"),), "percentunit"),
    Panel("Learnt a second", "Sessions and steps.",
          (("sum(rate(onerec_train_sessions_total[1m]))", "sessions"), ("sum(rate(onerec_train_steps_total[1m]))", "steps"))),
    Panel("Gradient norm", "Before clipping.", (("max(onerec_gradient_norm)", "norm"),)),
    Panel("Load of the experts", "The least and the most loaded; 1 is even.",
          (("max by (bound) (onerec_expert_load)", "{{bound}}"),)),
    Panel("Pairs", "Records of the pair log a second, by what became of them.",
          (("sum by (outcome) (rate(onerec_pairs_total[5m]))", "{{outcome}}"),)),
    Panel("Age of pairs, p95", "Age of a session's end when its pair is written, and when it is learnt.",
          (("stage:onerec_pair_age_seconds:p95", "{{stage}}"),), "s"),
    Panel("Drift", "Population stability index against the reference window: 0.1 is worth a look, from 0.25 OneRecDrift fires.",
          (("max by (feature) (onerec_drift_psi)", "{{feature}}"), ("max(onerec_unseen_item_share)", "share of unseen items"),
           ("vector(0.25)", "alert"))),
)

STREAM: Final = (
    stat("Events a second", "Valid ones, where most are taken in.",
         "max(sum by (job, process) (rate(onerec_events_total[1m])))"),
    stat("Refused", "Share of the lines of 5 minutes; above 0.1 % OneRecDeadLetters fires.",
         "max(process:onerec_dead_letters:ratio)", "percentunit"),
    stat("Lag", "Of the source that is furthest behind, in seconds of log.", "max(source:onerec_lag_seconds:max)", "s"),
    stat("Users", "Known to the stream.", "sum(max by (job, process, instance) (onerec_users))"),
    stat("Open sessions", "Not final yet.", "sum(onerec_open_sessions)"),
    stat("Last recovery", "Until the first record was taken.", "max(onerec_recovery_seconds)", "s"),
    Panel("Events", "Valid events a second, by process; several on the way count the same event.",
          (("sum by (job, process) (rate(onerec_events_total[1m]))", "{{job}} {{process}}"),), "short"),
    Panel("Lag", "Event time between the source's end and what was taken. `histories`: what the monitor sees from outside.",
          (("source:onerec_lag_seconds:max", "{{source}}"),), "s"),
    Panel("Lag in records", "By partition: one that nobody owns rises alone.",
          (("max by (source, partition) (onerec_lag_offsets)", "{{source}} {{partition}}"),)),
    Panel("Dead letters", "A second, by reason.",
          (("sum by (reason) (rate(onerec_dead_letters_total[5m]))", "{{reason}}"),)),
    Panel("Duplicate and late", "Events a second that had been seen, and those behind the watermark by what became of them.",
          (("sum(rate(onerec_duplicates_total[5m]))", "duplicate"),
           ("sum by (outcome) (rate(onerec_late_total[5m]))", "late, {{outcome}}"))),
    Panel("Sessions", "Made final a second, by quality.",
          (("sum by (quality) (rate(onerec_sessions_total[5m]))", "{{quality}}"),)),
    Panel("RocksDB", "Size on the disk.",
          (("max by (job, process, instance) (onerec_state_bytes)", "{{job}} {{process}}"),), "bytes"),
    Panel("Processes", "How many of each answer, and how often parts of `onerec run` were started again in an hour.",
          (("job:up:sum", "{{job}}"), ("max by (job, process) (onerec_process_up)", "{{job}} {{process}}"),
           ("sum by (process) (increase(onerec_process_restarts_total[1h])) > 0", "{{process}} started again"))),
    Panel("Memory", "Resident, by process.",
          (("max by (job, process, instance) (process_resident_memory_bytes)", "{{job}} {{process}}"),), "bytes"),
    Panel("Processor", "Cores in use, by process.",
          (("sum by (job, process, instance) (rate(process_cpu_seconds_total[1m]))", "{{job}} {{process}}"),)),
)

ASKED: Final = '{model="recommend"}'
SERVED: Final = f"sum(rate(nv_inference_request_success{ASKED}[1m]))"
SERVING: Final = (
    stat("Replicas", "Whether each answers the monitor.", "min(onerec_replica_up)", names=(("down", "red"), ("up", "green"))),
    stat("Version", "The newest that answers.", "max(onerec_replica_version)"),
    stat("Learnt up to", "Event time that the newest loaded version has learnt up to.", "max(onerec_bundle_watermark_ms)",
         "dateTimeAsIso", width=8),
    stat("Event → answer", "The headline, of the oldest replica.", "max(onerec_freshness_seconds)", "s"),
    stat("Requests waiting", "In Triton's queue; serve.max_queue_size is the most.",
         f"sum(nv_inference_pending_request_count{ASKED})"),
    Panel("Requests answered", "By the version that answered.",
          ((f"sum by (version) (rate(nv_inference_request_success{ASKED}[1m]))", "version {{version}}"),), "reqps"),
    Panel("Requests failed", "By reason. REJECTED: the queue was full.",
          ((f"sum by (reason) (rate(nv_inference_request_failure{ASKED}[1m]))", "{{reason}}"),
           ("sum(rate(onerec_refused_requests_total[1m]))", "refused by the model")), "reqps"),
    Panel("Mean time of a request", "Means, because Triton counts sums; waiting and computing are parts of it.",
          ((f"sum(rate(nv_inference_request_duration_us{ASKED}[1m])) / {SERVED} / 1000", "whole request"),
           (f"sum(rate(nv_inference_queue_duration_us{ASKED}[1m])) / {SERVED} / 1000", "waiting"),
           (f"sum(rate(nv_inference_compute_infer_duration_us{ASKED}[1m])) / {SERVED} / 1000", "computing")), "ms"),
    Panel("Time of the monitor's questions, p95", "As an application sees it, over the network.",
          (("replica:onerec_answer_seconds:p95", "{{replica}}"),), "s"),
    Panel("Requests in one run", "How many requests Triton joins into one run of the graph.",
          ((f"sum(rate(nv_inference_count{ASKED}[1m])) / sum(rate(nv_inference_exec_count{ASKED}[1m]))", "requests a run"),)),
    Panel("Unknown to the version",
          "Users without a stored history, and items of histories that the catalogue lacks. Rising: the replica of "
          "the histories stands still, or the catalogue is old.",
          (("sum(rate(onerec_unknown_users_total[1m]))", "users/s"),
           ("sum(rate(onerec_unknown_history_items_total[1m]))", "items/s"))),
    Panel("Event time learnt, by version", "A line that stays flat: nothing new is published.",
          (("onerec_bundle_watermark_ms", "version {{version}}"),), "dateTimeAsIso"),
    Panel("Triton's host: processor", "Share of all cores in use.", (("nv_cpu_utilization", "in use"),), "percentunit"),
    Panel("Triton's host: memory", "Of the host, not of Triton alone.",
          (("nv_cpu_memory_used_bytes", "in use"), ("nv_cpu_memory_total_bytes", "there")), "bytes"),
)

BOARDS: Final = {"freshness": FRESHNESS, "training": TRAINING, "stream": STREAM, "serving": SERVING}


def rendered(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    """A panel as Grafana keeps it."""
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.names:
        options = {str(value): {"text": text, "color": color} for value, (text, color) in enumerate(panel.names)}
        defaults["mappings"] = [{"type": "value", "options": options}]
    now: dict[str, Any] = {"instant": True, "range": False} if panel.kind in ("table", "bargauge") else {}
    if panel.kind == "table":
        now["format"] = "table"
    targets = [{"refId": chr(65 + place), "datasource": SOURCE, "expr": query, "legendFormat": legend, **now}
               for place, (query, legend) in enumerate(panel.queries)]
    return {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.description, "datasource": SOURCE,
        "gridPos": place, "fieldConfig": {"defaults": defaults, "overrides": []}, "targets": targets,
    }


def board(name: str) -> dict[str, Any]:
    """A dashboard: panels from left to right, a new row where one does not fit."""
    x = y = row = 0
    panels = []
    for number, panel in enumerate(BOARDS[name], 1):
        width = panel.width or (4 if panel.kind == "stat" else 12)
        height = 8 if panel.kind in ("timeseries", "bargauge") else 4
        if x + width > COLUMNS:
            x, y, row = 0, y + row, 0
        panels.append(rendered(number, panel, {"x": x, "y": y, "w": width, "h": height}))
        x, row = x + width, max(row, height)
    link = {"type": "dashboards", "title": "OneRec", "tags": ["onerec"], "asDropdown": False, "includeVars": False,
            "keepTime": True, "targetBlank": False, "icon": "", "tooltip": "", "url": ""}
    return {
        "uid": f"onerec-{name}", "title": f"OneRec: {name}", "tags": ["onerec"], "schemaVersion": 39, "version": 1,
        "editable": False, "timezone": "utc", "refresh": "10s", "time": {"from": "now-1h", "to": "now"}, "links": [link],
        "templating": {"list": []}, "annotations": {"list": []}, "panels": panels,
    }


def main() -> int:
    """1 where --check finds a file that is not what the tables say."""
    differ = []
    for name in BOARDS:
        path = FOLDER / f"{name}.json"
        text = json.dumps(board(name), indent=2, ensure_ascii=False) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            differ.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    print("differ: " + ", ".join(differ) if differ else "all dashboards are as written here")
    return 1 if differ and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
