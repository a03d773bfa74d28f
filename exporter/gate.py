"""The release gate: a candidate against the version served, on the newest sessions, before anybody is answered by it.

The served version's weights are read from its own bundle, so what is compared is what users get, whatever the trainer has
pruned. Loss: next-token prediction (eq. 4), teacher-forced, nats a code, mean over the first window of each
of the newest high-quality sessions: what a user would have been given when he came. The newest are, where there are enough,
sessions that neither version has learnt.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.bundle import GRAPH_FOLDER, GateScores, Manifest, Snapshot
from exporter.onnx_graph import layout
from exporter.tracing import WEIGHTS_FILE
from onerec.errors import Failure
from onerec.monitor.settings import GateConfig
from serving_config.recommend.engine import Beams, Graph
from streaming.sessions import Session
from streaming.store import Reader
from trainer.batches import window_batch
from trainer.config import ModelConfig
from trainer.data import Example, session_examples
from trainer.model import OneRec

BATCH_WINDOWS = 128
"""Windows scored at a time, of like lengths of history so that little is padded."""


class Judged(NamedTuple):
    """What the gate found, and why the candidate must not be served (None: it may)."""

    scores: GateScores
    fault: str | None


class NewestSessions:
    """The newest high-quality sessions of a state, oldest first; each `read` costs what came since the last one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._found: deque[tuple[int, Session]] = deque(maxlen=count)
        self._last: int | None = None

    def read(self, reader: Reader) -> Sequence[tuple[int, Session]]:
        """(sequence, session) of at most `count` sessions."""
        last = reader.last_sequence()
        if self._last is None:
            span = 4 * self._count
            while not self._fill(reader, max(0, last - span)) and span < last:
                span *= 4
        else:
            self._fill(reader, self._last)
        return self._found

    def _fill(self, reader: Reader, after: int) -> bool:
        if self._last is None or after < self._last:
            self._found.clear()
        self._last = after
        for sequence, session in reader.sessions(after=after):
            self._last = sequence
            if session.high_quality:
                self._found.append((sequence, session))
        return len(self._found) == self._count


def bundle_model(folder: Path, config: ModelConfig) -> OneRec:
    """The generator of a bundle in torch, from the weights file that its graph reads, in evaluation mode.

    Raises Failure where the file is not there or too short.
    """
    path = folder / GRAPH_FOLDER / WEIGHTS_FILE
    try:
        blob = np.memmap(path, dtype=np.uint8, mode="r")
        tensors = {
            place.name: torch.from_numpy(
                np.frombuffer(blob, np.float32, math.prod(place.shape), place.offset).reshape(place.shape).copy()
            )
            for place in layout(config)
        }
    except (OSError, ValueError) as error:
        raise Failure(f"{path} cannot be read ({error}), so nothing can be compared with it") from None
    model = OneRec(config)
    model.load_state_dict(tensors)
    return model.eval()


def mean_loss(model: OneRec, examples: Sequence[Example], item_codes: NDArray[np.int32]) -> float:
    """Mean NTP loss of the windows in nats a code; NaN or infinite where the model is."""
    total, items = 0.0, 0
    ordered = sorted(examples, key=lambda example: len(example.history))
    with torch.inference_mode():
        for start in range(0, len(ordered), BATCH_WINDOWS):
            some = ordered[start : start + BATCH_WINDOWS]
            batch = window_batch(some, item_codes, m=model.config.session_items)
            count = int(batch.target_mask.sum())
            total += float(model.loss(batch)[1]["ntp"]) * count
            items += count
    return total / items


def illegal(found: Beams, snapshot: Snapshot) -> str | None:
    """What is wrong with the answers as sessions of this catalogue; None where all are whole sessions of known items."""
    for row, leaves in enumerate(found.leaves):
        live = leaves[leaves[:, 0] >= 0]
        if not len(live):
            return f"answer {row + 1} holds no session"
        if live.min() < 0 or live.max() >= snapshot.trie.leaves:
            return f"answer {row + 1} holds an item that the catalogue does not have"
        rows = snapshot.trie.session_rows(live)
        if rows.min() < 0 or rows.max() >= len(snapshot.item_ids):
            return f"answer {row + 1} holds an item that the catalogue does not have"
        ordered = np.sort(rows, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            return f"answer {row + 1} holds an item twice in one session"
    return None


class Gate:
    """Scores candidates; keeps the newest sessions and the newest models between two of them.

    `clock`: seconds that only go forward, for the latency.
    """

    def __init__(self, settings: GateConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        self.settings = settings
        self._newest = NewestSessions(settings.sessions)
        self._clock = clock
        self._models: dict[str, OneRec] = {}

    def judge(
        self,
        reader: Reader,
        candidate: Manifest,
        folder: Path,
        snapshot: Snapshot,
        graph: Graph,
        served: tuple[Manifest, Path] | None,
    ) -> Judged:
        """Scores of a sealed candidate in `folder`, whose catalogue and graph are open, against `served` (None: the first).

        Without a session in the state, or beside a version of another codebook or one that cannot be read, no losses are
        compared.
        """
        newest = self._newest.read(reader)
        config = candidate.model_config
        index = {item_id: row for row, item_id in enumerate(snapshot.item_ids)}
        counts: Counter[str] = Counter()
        examples: list[Example] = []
        for _, session in newest:
            # Later windows of a session repeat most of its history: four times the work, hardly more to learn from.
            examples += session_examples(
                session, index, len(index), m=config.session_items, n=config.history_length, fresh=True, counts=counts
            )[:1]
        latency, fault = self._ask(graph, snapshot, examples, config)
        own = before = None
        compared = served if served and served[0].codebook_version == candidate.codebook_version else None
        if examples:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # OpenMP's threads spin, which beside a busy trainer costs more than they bring
            try:
                own = mean_loss(self._model(candidate, folder), examples, snapshot.item_codes)
                if compared and (model := self._served_model(*compared)) is not None:
                    before = mean_loss(model, examples, snapshot.item_codes)
            finally:
                torch.set_num_threads(threads)
        fault = fault or self._worse(own, before) or self._slow(latency)
        scores = GateScores(
            candidate=_number(own),
            served=_number(before),
            served_version=served[0].version if served else None,
            sessions=len(newest),
            windows=len(examples),
            unseen=sum(sequence > (candidate.sequence or 0) for sequence, _ in newest),
            answers=self.settings.legal,
            latency_ms=round(latency, 3),
            passed=fault is None,
        )
        return Judged(scores, fault)

    def _served_model(self, manifest: Manifest, folder: Path) -> OneRec | None:
        """None where the served version can no longer be read: that must not keep better ones from being served."""
        try:
            return self._model(manifest, folder)
        except Failure:
            return None

    def _model(self, manifest: Manifest, folder: Path) -> OneRec:
        """The model of a bundle; the two newest stay, as today's candidate is what the next one is compared with."""
        name = manifest.weights
        model = self._models.pop(name, None) or bundle_model(folder, manifest.model_config)
        self._models[name] = model
        for old in list(self._models)[:-2]:
            del self._models[old]
        return model

    def _ask(
        self, graph: Graph, snapshot: Snapshot, examples: Sequence[Example], config: ModelConfig
    ) -> tuple[float, str | None]:
        """Median ms of an answer to the newest windows' histories, and what is wrong with the answers."""
        histories = [snapshot.item_codes[example.history[-config.history_length :]] for example in examples]
        histories = histories[-self.settings.legal :] or [snapshot.item_codes[:0]]
        taken = []
        for history in histories:
            began = self._clock()
            found = graph.search([history.astype(np.int64)])
            taken.append(1e3 * (self._clock() - began))
            if (fault := illegal(found, snapshot)) is not None:
                return statistics.median(taken), fault
        return statistics.median(taken), None

    def _worse(self, own: float | None, before: float | None) -> str | None:
        if own is not None and not math.isfinite(own):
            return f"its loss on the newest sessions is {own}"
        if own is None or before is None or not math.isfinite(before) or own <= before * (1 + self.settings.worse):
            return None
        return (
            f"its loss on the newest sessions is {own:.3f} a code, {own / before - 1:.1%} more than the served version's "
            f"{before:.3f}; at most {self.settings.worse:.1%} is let through (gate.worse)"
        )

    def _slow(self, latency: float) -> str | None:
        if latency <= self.settings.latency_ms:
            return None
        return f"an answer takes {latency:.0f} ms, at most {self.settings.latency_ms:.0f} are let through (gate.latency_ms)"


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
