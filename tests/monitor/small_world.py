"""A simulated world of a few users in a state, a trainer small enough to learn it in seconds, and what a scrape gives."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from onerec.config import Config, load_config
from simulator.log import write_world
from simulator.world import World, WorldConfig
from streaming.replay import Replay
from streaming.store import Store

SETTINGS = [
    "train.batch_windows=16", "train.checkpoint_sessions=15", "train.threads=1", "train.precision=fp32",
    "train.score_share=0.5", "train.score_beams=4", "catalogue.codes=8", "catalogue.levels=2",
    "preference.ratio=0.6", "preference.responses=8", "preference.min_margin=0.0", "session.target_items=3",
]  # fmt: skip


def settings(*more: str) -> Config:
    """A run of few beams and codes."""
    return load_config(None, [*SETTINGS, *more])


def build_state(folder: Path, *, users: int = 40, days: int = 2) -> Path:
    """Simulates a world and replays it to its end; the state's folder."""
    world = World(WorldConfig(users=users, items=60, days=days, seed=3))
    write_world(world, folder / "log.jsonl", folder / "items.jsonl")
    with Store(folder / "state", settings().semantics) as store:
        Replay(store, [str(folder / "items.jsonl"), str(folder / "log.jsonl")]).run()
    return folder / "state"


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Lets the preset `tiny` be tinier."""
    from trainer import presets

    small = msgspec.structs.replace(
        presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, experts=2
    )
    patch.setitem(presets.PRESETS, "tiny", small)


class Scrape:
    """Samples of a metrics address: `scrape["onerec_loss", "ntp"]`, label values in the order of their names."""

    def __init__(self, address: str | None) -> None:
        assert address is not None
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:  # noqa: S310 - our own
            text = answer.read().decode()
        self.samples: dict[Any, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values = tuple(sample.labels[name] for name in sorted(sample.labels))
                self.samples[sample.name, *values] = sample.value

    def __getitem__(self, key: Any) -> float:
        return self.samples[key if isinstance(key, tuple) else (key,)]

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        """All series of a sample name by their label values."""
        return {key[1:]: value for key, value in self.samples.items() if key[0] == name}
