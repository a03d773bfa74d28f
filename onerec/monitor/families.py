"""Every metric there is, in one list: what processes expose, and what dashboards and alert rules may name.

Names and units follow Prometheus' conventions: base units, counters end in `_total`. A gauge that is not known is absent.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]

AGE_STAGES: Final = ("history", "session", "trained", "exported", "loaded", "answered")
"""Hand-offs of an event on its way to an answer; the age is that of the event when it gets there."""
PAIR_STAGES: Final = ("pair", "trained")
"""Hand-offs on the sampler's way: the session's end → its preference pair is written → the pair is learnt."""

AGE_BUCKETS: Final = (
    0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 25.0, 30.0, 45.0, 60.0, 120.0, 300.0, 600.0,
    1_800.0, 3_600.0, 7_200.0, 14_400.0, 43_200.0, 86_400.0,
)  # fmt: skip
"""Upper bounds in seconds, from 100 ms to a day; finest around the objectives of 2, 10 and 30 s."""
CALL_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Of what takes milliseconds to seconds: an answer, a step of a publish."""


class Family(NamedTuple):
    """A metric: `labels` beside those that Prometheus or `onerec run` add (`job`, `process`)."""

    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


FAMILIES: Final[dict[str, Family]] = {
    # The chain.
    "onerec_age_seconds": Family(
        "histogram", "Age of an event, by the log's clock, when it gets to a stage", ("stage",), AGE_BUCKETS),
    "onerec_pair_age_seconds": Family(
        "histogram", "Age of a session's end when its preference pair gets to a stage", ("stage",), AGE_BUCKETS),
    "onerec_history_used_age_seconds": Family(
        "histogram", "Age of the newest event that stored histories hold, when an answer uses them", ("replica",), AGE_BUCKETS),
    "onerec_new_item_age_seconds": Family(
        "histogram", "Age of a new item at the first answer that could contain it", ("replica",), AGE_BUCKETS),
    "onerec_watermark_seconds": Family("gauge", "Newest event time that a stage has reached, epoch seconds", ("stage",)),
    "onerec_freshness_seconds": Family(
        "gauge", "Headline: the log's clock minus what the replica's answer has learnt up to", ("replica",)),
    "onerec_log_clock_seconds": Family("gauge", "The log's clock: the wall clock in live time, else the newest event"),
    "onerec_log_factor": Family("gauge", "Seconds of log that pass in a second: 1 in live time"),
    "onerec_negative_ages_total": Family("counter", "Ages below zero: events ahead of the clock, in no bucket", ("stage",)),
    "onerec_clock_jumps_total": Family("counter", "Times that the wall clock jumped against the monotonic clock"),
    "onerec_freshness_objective_seconds": Family("gauge", "What the operator promises, event to answer: freshness.objective_s"),
    # The stream.
    "onerec_events_total": Family("counter", "Valid events taken in"),
    "onerec_dead_letters_total": Family("counter", "Lines refused, by reason", ("reason",)),
    "onerec_duplicates_total": Family("counter", "Events that had been seen before"),
    "onerec_late_total": Family("counter", "Events behind the watermark, by what became of them", ("outcome",)),
    "onerec_sessions_total": Family("counter", "Sessions made final, by quality", ("quality",)),
    "onerec_open_sessions": Family("gauge", "Users with a session that is not final yet; they seldom have two"),
    "onerec_users": Family("gauge", "Users known"),
    "onerec_lag_seconds": Family(
        "gauge", "Time from what has been taken to the source's end: log time of files, the broker's of topics", ("source",)),
    "onerec_lag_offsets": Family("gauge", "Records between the source's end and what has been taken", ("source", "partition")),
    "onerec_state_bytes": Family("gauge", "Size of RocksDB on the disk"),
    "onerec_recovery_seconds": Family("gauge", "How long the last start took until records could be taken"),
    # The trainer.
    "onerec_train_steps_total": Family("counter", "Steps of the trainer"),
    "onerec_train_sessions_total": Family("counter", "Sessions learnt"),
    "onerec_skipped_steps_total": Family("counter", "Steps not applied: a loss or gradient was not finite"),
    "onerec_preference_steps_total": Family("counter", "Steps that learnt preference pairs too"),
    "onerec_loss": Family("gauge", "Loss of the newest step: ntp, preference, reward", ("objective",)),
    "onerec_gradient_norm": Family("gauge", "Gradient norm of the newest step, before clipping"),
    "onerec_expert_load": Family("gauge", "Load of the least and the most loaded expert; 1 is even", ("bound",)),
    "onerec_hits_total": Family("counter", "Test-then-train: windows that were hit, by hour of the day", ("model", "hour")),
    "onerec_scored_total": Family("counter", "Test-then-train: windows scored, by hour of the day", ("hour",)),
    "onerec_hit_rate": Family("gauge", "Test-then-train hit rate over the newest windows", ("model",)),
    "onerec_version_hit_rate": Family(
        "gauge", "Test-then-train hit rate right after the newest checkpoint that another has followed (served), and the one "
        "before it (previous)", ("which",)),
    "onerec_checkpoint_timestamp_seconds": Family("gauge", "When the newest checkpoint was written, epoch seconds"),
    "onerec_checkpoint_step": Family("gauge", "Step of the newest checkpoint"),
    "onerec_pairs_total": Family("counter", "Records of the pair log, by what became of them", ("outcome",)),
    "onerec_pairs_unread": Family("gauge", "Pairs made that the trainer has not taken"),
    "onerec_sampler_versions_behind": Family("gauge", "Checkpoints between the sampler's snapshot and the newest"),
    # The publisher and its gate.
    "onerec_published_version": Family("gauge", "Newest version given to Triton"),
    "onerec_publish_timestamp_seconds": Family("gauge", "When the newest version was given to Triton, epoch seconds"),
    "onerec_publish_interval_seconds": Family("gauge", "How often the publisher looks for something to publish"),
    "onerec_publishes_total": Family("counter", "Candidates, by outcome: published, held, failed", ("outcome",)),
    "onerec_publish_seconds": Family("histogram", "Time of a step of a publish", ("step",), CALL_BUCKETS),
    "onerec_gate_score": Family("gauge", "Mean loss per code on the newest sessions, at the newest gate", ("model",)),
    "onerec_gate_failed": Family("gauge", "1: the newest candidate was held back"),
    "onerec_publishing_on_hold": Family("gauge", "1: after a rollback nothing is published until `onerec promote`"),
    # The monitor.
    "onerec_process_up": Family("gauge", "1: the part of `onerec run` is running; 0: it died", ("process",)),
    "onerec_process_restarts_total": Family("counter", "How often a part of `onerec run` was started again", ("process",)),
    "onerec_replica_up": Family("gauge", "1: the replica answers", ("replica",)),
    "onerec_replica_version": Family("gauge", "Version that the replica answers with", ("replica",)),
    "onerec_answer_seconds": Family("histogram", "Time of a probe's answer", ("replica",), CALL_BUCKETS),
    "onerec_drift_psi": Family(
        "gauge", "Population stability index against the reference window: codes, watch_time, event_mix", ("feature",)),
    "onerec_unseen_item_share": Family("gauge", "Share of the newest items watched that the reference window has not"),
}


def table() -> str:
    """The list as a Markdown table, as docs/metrics.md holds it: `python -m onerec.monitor.families` prints it."""
    lines = ["| metric | kind | meaning |", "|---|---|---|"]
    for name, family in FAMILIES.items():
        labels = f"{{{','.join(family.labels)}}}" if family.labels else ""
        lines.append(f"| `{name}{labels}` | {family.kind} | {family.help} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
