"""A small system under a monitor, without processes: a state that is written, versions that are manifests, answers by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from exporter import bundle
from exporter.repository import Repository
from onerec.monitor.drift import Drift
from onerec.monitor.ledger import Ledger
from onerec.monitor.log_time import Clock
from onerec.monitor.looks import RepositoryLook, RunLook, StateLook
from onerec.monitor.prober import Answer
from onerec.monitor.watch import Monitor, News
from streaming.semantics import Semantics, SessionConfig, StreamConfig
from streaming.store import Store
from trainer.config import ModelConfig

T0 = 1_700_000_000_000
GAP_MS = 1_000
LATENESS_MS = 500
SEMANTICS = Semantics(session=SessionConfig(gap_ms=GAP_MS), stream=StreamConfig(max_out_of_orderness_ms=LATENESS_MS))
MODEL = ModelConfig(codes=8, levels=3, session_items=3, history_length=6, d_model=16, heads=2, d_ff=16)


class HandClock(Clock):
    """Clocks that move when told to."""

    def __init__(self, wall_ms: int = T0) -> None:
        self.wall, self.seconds = wall_ms, 0.0

    def wall_ms(self) -> int:
        return self.wall

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        """Both go on."""
        self.wall += round(seconds * 1000)
        self.seconds += seconds


class Watched:
    """State, run and repository in a folder, and the monitor over them; `mode` as `freshness.clock`."""

    def __init__(self, folder: Path, *, mode: str = "live", replicas: tuple[str, ...] = ("a:1", "b:1")) -> None:
        self.folder, self.mode, self.replicas = folder, mode, replicas
        self.clock = HandClock()
        self.said: list[str] = []
        self.news: list[News] = []
        self.ages: list[tuple[Answer, int | None]] = []
        self.store = Store(folder / "state", SEMANTICS)
        self._core = self.store.core()
        self.monitor = self.start()

    @property
    def ledger_path(self) -> Path:
        return self.folder / "run" / "freshness.jsonl"

    def start(self, drift: Drift | None = None) -> Monitor:
        """A monitor; also what comes after a restart."""
        self.ledger = Ledger(self.ledger_path)
        return Monitor(
            StateLook(self.folder / "state"), RunLook(self.folder / "run"), RepositoryLook(self.folder / "repository"),
            self.replicas, mode=self.mode, ledger=self.ledger, drift=drift, clock=self.clock,
            on_answer=lambda answer, now: self.ages.append((answer, now)), on_news=self.news.append, say=self.said.append,
        )  # type: ignore[arg-type]  # fmt: skip

    def watch(self, user: str, *times: int, item: str = "v1") -> None:
        """Watches of a user, ms after T0, one commit."""
        lines = [
            (ts, msgspec.json.encode({
                "user_id": user, "item_id": item, "ts": T0 + ts, "type": "watch", "watch_ms": 30_000, "duration_ms": 30_000,
            }))
            for ts in times
        ]  # fmt: skip
        self.store.commit(self._core, self._core.apply(lines, now_ms=T0 + 10**9), {})

    def item(self, item_id: str, ts: int) -> int:
        """A catalogue entry uploaded at ms after T0; returns the item sequence."""
        line = msgspec.json.encode({"type": "item", "item_id": item_id, "ts": T0 + ts, "user_id": ""})
        self.store.commit(self._core, self._core.apply([(ts, line)], now_ms=T0 + 10**9), {})
        return self.store.progress().item_sequence

    def publish(self, version: int, change: Callable[[dict], None] = lambda record: None, **more: object) -> None:
        """A version that is no more than its manifest."""
        folder = Repository(self.folder / "repository").folder(version)
        folder.mkdir(parents=True)
        fields = {
            "version": version, "codebook_version": "book", "catalogue_revision": "r", "items": 1, "leaves": 1,
            "watermark": None, "step": version * 10, "model_config": MODEL, "width": 2, "created_ms": self.clock.wall,
            "parity": None, "files": {}, **more,
        }  # fmt: skip
        bundle.write_manifest(folder, bundle.Manifest(**fields))  # type: ignore[arg-type]

    def loaded(self, version: int) -> None:
        """The publisher writes down that Triton has the version."""
        repository = Repository(self.folder / "repository")
        with repository.lock():
            repository.record("published", version, self.clock.wall / 1000, None)

    def answer(self, replica: str, version: int | None, watermark: int | None = None, history: int | None = None) -> None:
        """A replica's answer now, and a look of the monitor; `version` None: it is down."""
        self.monitor.answered(Answer(
            replica=replica, at_ms=self.clock.wall, up=version is not None, seconds=0.01, by_user=history is not None,
            version=version, watermark_ms=watermark, history_watermark_ms=history, fault="" if version else "down",
        ))  # fmt: skip
        self.monitor.step()

    def close(self) -> None:
        self.monitor.close()
        self.store.close()
