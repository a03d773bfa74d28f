"""A small real world for tests of releases: a RocksDB state with sessions, its catalogue, checkpoints, one repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from exporter.bundle import link
from exporter.export import Export
from exporter.publisher import Publisher
from exporter.steps import Report, silent
from onerec.config import Config
from onerec.monitor.settings import GateConfig
from streaming.items import ItemRecord
from streaming.semantics import Semantics
from streaming.sessions import Session, SessionItem
from streaming.store import Reader, Store
from trainer.checkpoint import Checkpoint, Cursor, save_checkpoint
from trainer.config import ModelConfig
from trainer.items import build_catalogue, load_catalogue
from trainer.model import OneRec

WIDTH = 12
ITEMS = 30
SESSIONS = 24
START = 1_700_000_000_000
MINUTE = 60_000
Change = Callable[[dict[str, torch.Tensor]], None]


def session(number: int) -> Session:
    """The high-quality session of a user of his own: six watches, a minute each, after a history of three items."""
    items = [
        SessionItem(
            item_id=f"v{(number * 7 + place) % ITEMS}", ts=START + (number * 10 + place) * MINUTE, watch_ms=MINUTE,
            duration_ms=MINUTE, interactions=[], effective=True,
        )
        for place in range(6)
    ]  # fmt: skip
    return Session(
        session_id=f"u{number}:{items[0].ts}", user_id=f"u{number}", request_id=None, start=items[0].ts, end=items[-1].ts,
        items=items, history=[f"v{(number * 7 + place) % ITEMS}" for place in (20, 21, 22)], watched=6,
        total_watch_ms=6 * MINUTE, interactions=0, high_quality=True, swt=1.0, vtr=1.0, wtr=0, ltr=0, positives=[],
    )  # fmt: skip


def add_sessions(state: Path, numbers: range) -> None:
    """More of the log."""
    with Store(state, Semantics()) as store:
        store.append([session(number) for number in numbers], {}, watermark=session(numbers[-1]).end)


def add_items(state: Path, *names: str) -> None:
    """New catalogue entries."""
    with Store(state, Semantics()) as store:
        store.put_items([ItemRecord(item_id=name, ts=START, duration_ms=MINUTE, tags=["tag"]) for name in names])


def make_state(state: Path) -> None:
    """A log of `SESSIONS` sessions and the catalogue of its items."""
    add_items(state, *(f"v{number}" for number in range(ITEMS)))
    add_sessions(state, range(SESSIONS))
    codes = state / "codes.jsonl"
    codes.write_text("".join(
        json.dumps({"item_id": f"v{n}", "codes": [n % 8, n // 4 % 8, n * 3 % 8]}) + "\n" for n in range(ITEMS)
    ))
    with Reader(state) as reader:
        build_catalogue(state, reader, Config(), codes_file=codes)


def noise(weights: dict[str, torch.Tensor]) -> None:
    """Poison: finite weights that are sure of what is wrong."""
    generator = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if value.is_floating_point() and value.dim() > 1 and not name.endswith("bias"):
            value += 3 * torch.randn(value.shape, generator=generator)


def not_a_number(weights: dict[str, torch.Tensor]) -> None:
    """One weight that is no number."""
    next(iter(weights.values())).view(-1)[3] = float("nan")


class World:
    """State, run and repository in one folder; graph templates are shared with `templates`."""

    def __init__(self, folder: Path, state: Path, templates: Path | None = None) -> None:
        self.state, self.run, self.repository = folder / "state", folder / "run", folder / "repository"
        shutil.copytree(state, self.state)
        self.run.mkdir()
        (self.run / "run.json").write_text(json.dumps({"state": str(self.state)}))
        if templates is not None:
            shutil.copytree(templates, self.repository / ".onerec" / "templates", copy_function=_link)

    @property
    def export(self) -> Export:
        return Export(run_dir=self.run, width=WIDTH, threads=1)

    def publisher(self, server: str | None = None, report: Report = silent, **gate: float) -> Publisher:
        """A publisher of this run."""
        settings = GateConfig(**{"sessions": 16, "legal": 2, **gate})  # type: ignore[arg-type]
        return Publisher(self.export, self.repository, server=server, gate=settings, report=report)

    def checkpoint(self, step: int, *, seed: int = 1, sequence: int = SESSIONS, change: Change | None = None) -> Checkpoint:
        """An untrained small model as the checkpoint of a step, its weights changed by `change`."""
        catalogue = load_catalogue(self.state)
        config = ModelConfig(
            d_model=16, heads=2, d_ff=16, encoder_layers=1, decoder_layers=1, experts=2, levels=catalogue.levels,
            codes=catalogue.codes, session_items=3, history_length=20,
        )  # fmt: skip
        torch.manual_seed(seed)
        weights = OneRec(config).state_dict()
        weights["level_head.0"] += step * 1e-6  # no two steps have the same weights
        if change is not None:
            change(weights)
        return save_checkpoint(
            self.run,
            Checkpoint(
                step=step, cursor=Cursor(sequence=sequence), watermark=START + step * 1_000,
                codebook_version=catalogue.version, items=len(catalogue.item_ids), model_config=config, session_items=3,
                metrics_bytes=0, score=None, counters={}, created_ms=START + step, config_sha256="c" * 64,
                code_version="0.1.0+abc", source={"log.jsonl": {"records": step * 10, "bytes": step * 1_000}},
            ),  # fmt: skip
            weights,
            {},
        )


def _link(source: str, target: str) -> None:
    link(Path(source), Path(target))
