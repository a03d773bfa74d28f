"""The trainer on a log that comes from Kafka: it follows, though its feeder is killed, and learns the same bytes."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import orjson
import pytest
from feeding import SEMANTICS, T0, Worker, session
from patience import PATIENCE
from test_feed import command, fed, grown, log

from onerec.config import Config, load_config
from streaming.kafka.settings import KafkaConfig
from trainer import presets
from trainer.checkpoint import latest_checkpoint
from trainer.loop import Progress, Result, train

ITEMS = 24
USERS = 30
MINUTES = 6


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    small = msgspec.structs.replace(
        presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, experts=2
    )
    monkeypatch.setitem(presets.PRESETS, "tiny", small)


def configuration() -> Config:
    return load_config(None, [
        "train.preset=tiny", "train.batch_windows=8", "train.threads=1", "train.score_share=0", "train.precision=fp32",
        "train.idle_seconds=0.2", "catalogue.codes=8", "catalogue.levels=2",
    ])


def catalogue() -> list[tuple[str, bytes | None]]:
    rng = random.Random(1)
    return [
        (f"i{number}", orjson.dumps({
            "type": "item", "item_id": f"i{number}", "ts": T0, "duration_ms": 9_000, "tags": [str(number % 8)],
            "embedding": [float(number % 8 == k) + 0.2 * rng.random() for k in range(8)],
        }))
        for number in range(ITEMS)
    ]


def weights(run: Path) -> str:
    return latest_checkpoint(run).files["model.safetensors"]


@pytest.mark.slow
def test_a_trainer_follows_a_log_whose_feeder_is_killed(cluster: Callable[..., KafkaConfig], tmp_path: Path) -> None:
    config = cluster(partitions=3, stall_seconds=5)
    state = tmp_path / "state"
    with Worker(config, SEMANTICS) as worker:
        worker.catalogue(catalogue())
        for partition in range(3):
            worker.commit(partition, [session(f"u{partition}-{n}", n / USERS) for n in range(USERS)], watermark=3)
        feeding = command("feed", config, state)
        try:
            wait(lambda: len(grown(state)) == 3 * USERS)
            learnt: list[Progress] = []
            results: list[Result] = []
            total = 3 * USERS * MINUTES
            deadline = time.monotonic() + PATIENCE * 120

            def stopped() -> bool:
                return time.monotonic() > deadline or bool(learnt and learnt[-1].sessions == total)

            trainer = threading.Thread(target=lambda: results.append(
                train(state, tmp_path / "followed", configuration(), follow=True, stopped=stopped, progress=learnt.append)
            ))
            trainer.start()
            for minute in range(1, MINUTES):
                for partition in range(3):
                    found = [session(f"u{partition}-{n}", 3 * minute + n / USERS) for n in range(USERS)]
                    worker.commit(partition, found, watermark=3 * minute + 3)
                    if partition == 1:
                        feeding.kill()
                        feeding.communicate()
                        feeding = command("feed", config, state)
            worker.end()
            trainer.join(130)
            wait(lambda: len(log(state)) == total)
        finally:
            feeding.kill()
            feeding.communicate()
    assert results[0].sessions == total and results[0].unknown_targets == 0
    fed(config, tmp_path / "whole")
    assert log(tmp_path / "whole") == log(state)
    # Made of the sessions that were there then; made of all of them it has to be the same again.
    shutil.rmtree(state / "catalogue")
    for name, folder in (("one", tmp_path / "whole"), ("other", state)):
        train(folder, tmp_path / name, configuration())
    assert weights(tmp_path / "one") == weights(tmp_path / "other")
    assert results[0].watermark is not None and T0 < results[0].watermark <= T0 + 60_000 * 3 * MINUTES


def wait(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + PATIENCE * seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
