"""What a version brings is aged once for each replica, by the log's clock when it first answered, and by every hand-off."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from watched import GAP_MS, LATENESS_MS, T0, Watched

from exporter import bundle
from exporter.release import HeldBack, begin_hold, hold_back, lift_hold
from exporter.repository import Repository
from onerec.monitor.ledger import Ledger
from onerec.monitor.metrics import Metrics
from onerec.monitor.of_monitor import MonitorMetrics


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    found = Watched(tmp_path)
    yield found
    found.close()


def first_version(watched: Watched) -> None:
    """Two sessions, learnt by version 1, which both replicas answer with at second 10."""
    watched.watch("u1", 0, 100)
    watched.watch("u2", 200)
    watched.watch("late", 5_000)
    watched.clock.sleep(10)
    watched.monitor.step()
    watched.publish(1, watermark=T0 + 200, sequence=2, item_sequence=0)
    watched.loaded(1)
    for replica in watched.replicas:
        watched.answer(replica, 1, T0 + 200)


def second_version(watched: Watched) -> None:
    """Three watches in two sessions from second 10 on, trained at 20, exported at 21, loaded at 22, answered by a:1 at 23."""
    watched.watch("u3", 11_000, 11_500)
    watched.clock.sleep(2)  # 12
    watched.monitor.step()
    watched.watch("u4", 12_500)
    watched.watch("late", 20_000)
    watched.clock.sleep(4)  # 16
    watched.monitor.step()
    watched.clock.sleep(5)  # 21
    watched.publish(2, watermark=T0 + 12_500, sequence=5, item_sequence=0, checkpoint_created_ms=T0 + 20_000)
    watched.clock.sleep(1)
    watched.loaded(2)
    watched.clock.sleep(1)
    watched.monitor.step()
    watched.answer("a:1", 2, T0 + 12_500)


def test_what_was_there_before_the_first_version_is_not_aged(watched: Watched) -> None:
    first_version(watched)
    lines = watched.ledger.lines
    assert [(line.replica, line.version, line.events) for line in lines] == [("a:1", 1, 0), ("b:1", 1, 0)]
    assert all(line.age_s is None for line in lines)
    assert [len(news.event_ms) for news in watched.news] == [0, 0]
    assert lines[0].log_clock_ms == T0 + 10_000 and lines[0].mode == "live" and lines[0].factor == 1.0


def test_the_ages_of_a_version_are_those_of_its_events_at_every_hand_off(watched: Watched) -> None:
    first_version(watched)
    second_version(watched)
    line = watched.ledger.lines[-1]
    assert (line.replica, line.version, line.step, line.sequence_from, line.sequence_to) == ("a:1", 2, 20, 2, 5)
    # Sequence 3 is the session at 5 s, from before the first version; 4 and 5 hold three watches.
    assert line.events == 3
    assert sorted(watched.news[-1].event_ms - T0) == [11_000, 11_500, 12_500]
    assert watched.news[-1].now_ms == T0 + 23_000
    assert line.age_s is not None
    assert {stage: ages["p50"] for stage, ages in line.age_s.items()} == {
        "history": 1.0, "session": 4.5, "trained": 8.5, "exported": 9.5, "loaded": 10.5, "answered": 11.5,
    }  # fmt: skip
    assert line.age_s["answered"]["p95"] == pytest.approx(11.95)


def test_each_replica_is_counted_on_its_own_and_no_version_twice(watched: Watched) -> None:
    first_version(watched)
    second_version(watched)
    watched.clock.sleep(7)
    watched.answer("a:1", 2, T0 + 12_500)
    watched.answer("b:1", 2, T0 + 12_500)
    by_replica = [(line.replica, line.version) for line in watched.ledger.lines]
    assert by_replica == [("a:1", 1), ("b:1", 1), ("a:1", 2), ("b:1", 2)]
    assert (watched.ledger.lines[-1].age_s or {})["answered"]["p50"] == 18.5
    assert [len(news.event_ms) for news in watched.news] == [0, 0, 3, 3]


def test_after_a_restart_nothing_is_counted_again_and_nothing_left_out(watched: Watched) -> None:
    first_version(watched)
    second_version(watched)
    watched.monitor.close()
    watched.monitor = watched.start()
    watched.news.clear()
    watched.answer("a:1", 2, T0 + 12_500)
    assert watched.news == []
    watched.watch("u5", 24_000)
    watched.watch("later", 40_000)
    watched.clock.sleep(20)
    watched.publish(3, watermark=T0 + 24_000, sequence=7)
    watched.loaded(3)
    watched.answer("a:1", 3, T0 + 24_000)
    assert sorted(watched.news[-1].event_ms - T0) == [20_000, 24_000]
    watched.answer("b:1", 3, T0 + 24_000)
    assert len(watched.news[-1].event_ms) == 5, "b:1 had not answered with version 2"


def test_a_version_that_was_skipped_is_counted_with_the_next(watched: Watched) -> None:
    first_version(watched)
    watched.publish(2, watermark=T0 + 200, sequence=2)
    watched.watch("u5", 12_000)
    watched.watch("later", 20_000)
    watched.clock.sleep(15)
    watched.publish(3, watermark=T0 + 12_000, sequence=4)
    watched.loaded(3)
    watched.answer("a:1", 3, T0 + 12_000)
    line = watched.ledger.lines[-1]
    assert (line.version, line.sequence_from, line.sequence_to, line.events) == (3, 2, 4, 1)


def test_without_a_manifest_the_watermark_tells_which_sessions_are_new(watched: Watched) -> None:
    first_version(watched)
    second_version(watched)
    watched.watch("u6", 25_000)
    watched.watch("later", 40_000)
    watched.clock.sleep(20)
    shutil.rmtree(watched.folder / "repository")
    watched.answer("a:1", 9, T0 + 20_000)
    watched.clock.sleep(5)
    watched.monitor.step()
    line = watched.ledger.lines[-1]
    assert (line.version, line.sequence_from, line.sequence_to, line.events, line.step) == (9, 5, 6, 1, None)
    assert line.age_s is not None and "answered" in line.age_s
    assert not {"trained", "exported", "loaded"} & set(line.age_s)


def test_a_line_waits_for_the_publishers_word_but_not_for_ever(watched: Watched) -> None:
    first_version(watched)
    watched.publish(2, watermark=T0 + 300, sequence=2)
    watched.answer("a:1", 2, T0 + 300)
    assert len(watched.ledger.lines) == 2
    watched.clock.sleep(1)
    watched.monitor.step()
    assert len(watched.ledger.lines) == 2
    watched.clock.sleep(3)
    watched.monitor.step()
    assert len(watched.ledger.lines) == 3


def test_new_items_are_aged_at_the_first_version_that_knows_them(watched: Watched) -> None:
    first_version(watched)
    old, new = watched.item("old", 3_000), watched.item("new", 12_000)
    watched.clock.sleep(5)
    watched.publish(2, watermark=T0 + 200, sequence=2, item_sequence=new)
    watched.loaded(2)
    watched.answer("a:1", 2, T0 + 200)
    line = watched.ledger.lines[-1]
    assert (old, new) == (1, 2)
    assert (line.events, line.items, line.item_sequence, line.item_age_s) == (0, 1, 2, {"p50": 3.0, "p95": 3.0})
    assert list(watched.news[-1].item_ms - T0) == [12_000], "the old one was there before the first version"


def test_in_a_replay_ages_are_seconds_of_log(tmp_path: Path) -> None:
    watched = Watched(tmp_path, mode="log")
    first_version(watched)
    assert watched.ledger.lines[0].log_clock_ms == T0 + 5_000 and watched.ledger.lines[0].mode == "log"
    watched.watch("u3", 3_600_000)
    watched.watch("late", 3_700_000)
    watched.clock.sleep(1)
    watched.monitor.step()
    watched.clock.sleep(1)
    watched.publish(2, watermark=T0 + 3_600_000, sequence=4)
    watched.loaded(2)
    watched.answer("a:1", 2, T0 + 3_600_000)
    line = watched.ledger.lines[-1]
    assert line.age_s is not None and line.age_s["answered"] == {"p50": 100.0, "p95": 100.0}
    watched.close()


def test_a_clock_that_jumps_back_is_said_and_ages_below_zero_are_in_no_bucket(watched: Watched) -> None:
    metrics = Metrics("monitor")
    told = MonitorMetrics(metrics, 30.0)
    first_version(watched)
    watched.watch("u3", 11_000)
    watched.watch("late", 20_000)
    watched.clock.sleep(12)
    watched.monitor.step()
    watched.clock.wall -= 3_600_000
    watched.monitor.step()
    watched.publish(2, watermark=T0 + 11_000, sequence=4)
    watched.loaded(2)
    watched.answer("a:1", 2, T0 + 11_000)
    told.snapshot = watched.monitor.snapshot()
    told.news(watched.news[-1])
    text = scrape(metrics)
    assert "onerec_clock_jumps_total 1.0" in text
    assert 'onerec_negative_ages_total{stage="answered"} 1.0' in text
    assert 'onerec_age_seconds_count{stage="answered"} 0.0' in text
    assert scrape(metrics).count("onerec_clock_jumps_total 1.0") == 1, "a jump is counted once, however often it is read"


def scrape(metrics: Metrics) -> str:
    for look in metrics.before_scrape:
        look()
    return generate_latest(metrics.registry).decode()


def samples(text: str, name: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name]


def test_gauges_tell_each_replica_and_what_is_not_known_is_absent(watched: Watched) -> None:
    metrics = Metrics("monitor")
    told = MonitorMetrics(metrics, 30.0)
    watched.monitor.step()
    told.snapshot = watched.monitor.snapshot()
    text = scrape(metrics)
    assert "onerec_freshness_objective_seconds 30.0" in text
    for name in ("freshness_seconds", "watermark_seconds", "drift_psi", "gate_failed", "published_version", "checkpoint_step"):
        assert f"\nonerec_{name}" not in text
    assert "\nonerec_state_bytes" in text and "\nonerec_log_factor 1.0" in text
    first_version(watched)
    watched.clock.sleep(1)
    watched.answer("a:1", 1, T0 + 200, history=T0 + 5_000)
    watched.answer("b:1", None)
    for answer, now in watched.ages:
        told.answered(answer, now)
    watched.clock.sleep(3)
    told.snapshot = watched.monitor.step()
    text = scrape(metrics)
    marks = {sample.labels["stage"]: sample.value for sample in samples(text, "onerec_watermark_seconds")}
    assert marks == {
        "event": T0 / 1000 + 5, "history": (T0 - LATENESS_MS) / 1000 + 5, "session": T0 / 1000 + 0.2,
        "exported": T0 / 1000 + 0.2, "answered": T0 / 1000 + 0.2,
    }  # fmt: skip
    for expected in (
        'onerec_replica_up{replica="a:1"} 1.0', 'onerec_replica_up{replica="b:1"} 0.0',
        'onerec_replica_version{replica="a:1"} 1.0',
        'onerec_freshness_seconds{replica="a:1"} 10.8', 'onerec_history_used_age_seconds_sum{replica="a:1"} 6.0',
        "onerec_published_version 1.0", "onerec_gate_failed 0.0", "onerec_publishing_on_hold 0.0",
    ):  # fmt: skip
        assert expected in text, expected
    assert 'onerec_replica_version{replica="b:1"}' not in text
    assert 'onerec_freshness_seconds{replica="b:1"}' not in text


def test_replicas_that_come_and_go_are_said_once(watched: Watched) -> None:
    for version in (None, None, 1, 1, None):
        watched.answer("a:1", version)
    assert [text for text in watched.said if text.startswith("a:1")] == [
        "a:1 does not answer: down", "a:1 answers", "a:1 does not answer: down",
    ]  # fmt: skip
    assert watched.monitor.snapshot().versions == []
    watched.answer("a:1", 2)
    watched.answer("b:1", 1)
    assert watched.monitor.snapshot().versions == [1, 2]


def test_a_state_that_comes_late_goes_and_comes_back(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.watch("u1", 0)
    watched.store.close()
    state = tmp_path / "state"
    away = state.rename(tmp_path / "away")
    monitor = watched.monitor
    assert monitor.step().state.newest is None
    assert "there is none" in " ".join(monitor.snapshot().faults)
    state.mkdir()
    (state / "db").mkdir()
    (state / "db" / "CURRENT").write_text("half a state")
    assert monitor.step().state.newest is None and monitor.snapshot().faults
    shutil.rmtree(state)
    away.rename(state)
    assert monitor.step().state.newest == T0
    again = Watched(tmp_path / "other")
    again.watch("u1", 7_000)
    again.close()
    shutil.rmtree(state)
    (tmp_path / "other" / "state").rename(state)
    assert monitor.step().state.newest == T0 + 7_000, "another state at the same place"
    monitor.close()


def test_users_of_the_newest_sessions_are_asked_for(watched: Watched) -> None:
    watched.monitor.step()
    assert watched.monitor.users.next() is None
    for number in range(5):
        watched.watch(f"u{number}", number * 10 * GAP_MS)
    watched.clock.sleep(2)
    watched.monitor.step()
    assert [watched.monitor.users.next() for _ in range(4)] == ["u3", "u2", "u1", "u0"]


def test_of_many_sessions_every_kth_is_aged(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    from onerec.monitor import looks

    monkeypatch.setattr(looks, "SAMPLE_SESSIONS", 4)
    first_version(watched)
    for number in range(10):
        watched.watch(f"many{number}", 20_000 + number)
    watched.watch("later", 60_000)
    watched.clock.sleep(60)
    watched.publish(2, watermark=T0 + 20_009, sequence=13)
    watched.loaded(2)
    watched.answer("a:1", 2, T0 + 20_009)
    line = watched.ledger.lines[-1]
    assert (line.sequence_from, line.sequence_to, line.stride, line.events) == (2, 13, 3, 4)
    assert sorted(watched.news[-1].event_ms - T0) == [20_000, 20_003, 20_006, 20_009]


def test_a_ledger_that_cannot_be_written_is_said_once_and_stops_nothing(watched: Watched) -> None:
    watched.ledger_path.parent.mkdir()
    watched.ledger_path.mkdir()
    first_version(watched)
    for replica in watched.replicas:
        watched.answer(replica, 1, T0 + 200)
    assert sum("cannot be" in text or "ledger" in text for text in watched.said) == 1
    assert len(watched.ledger.lines) == 2
    assert Ledger(watched.ledger_path).lines == []


def test_what_the_gate_held_back_is_told_until_something_newer_is_out(watched: Watched) -> None:
    metrics = Metrics("monitor")
    told = MonitorMetrics(metrics, 30.0)
    first_version(watched)
    place = Repository(watched.folder / "repository")
    staged = place.new_staging(2)
    manifest = bundle.read_manifest(place.folder(1))
    watched.clock.sleep(5)
    with place.lock():
        hold_back(place, staged, 2, HeldBack("worse by 9 %", manifest), watched.clock.wall / 1000)
        begin_hold(place, "bad answers", [3], 1, watched.clock.wall / 1000)
    watched.clock.sleep(3)
    told.snapshot = watched.monitor.step()
    text = scrape(metrics)
    assert "onerec_gate_failed 1.0" in text and "onerec_publishing_on_hold 1.0" in text
    lift_hold(place)
    watched.clock.sleep(3)
    watched.publish(4, watermark=T0 + 200, sequence=2)
    told.snapshot = watched.monitor.step()
    text = scrape(metrics)
    assert "onerec_gate_failed 0.0" in text and "onerec_publishing_on_hold 0.0" in text
