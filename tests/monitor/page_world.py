"""A world for the page: a state with hostile names, a run's files, and a Triton that says what a test wants."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from onerec.dashboard.page import Page, Sources
from onerec.dashboard.server import bind, make
from streaming.replay import Replay
from streaming.semantics import Semantics
from streaming.store import Store
from trainer.evaluate import Line, PreferenceLine

START_MS = 1_704_067_200_000
IMG = '<img src=x onerror="window.hacked=1">'
SCRIPT_USER = '"><script>window.hacked=1</script>'
RTL_USER = "משתמש-٣"
PATH_USER = "../../etc/passwd?x=1&y#z"
RTL_ITEM = "וידאו שלום"
LONG_TITLE = "long " * 2_000 + "END"
PLAIN_USER = "plain"


def write_log(folder: Path) -> list[str]:
    """Files of items and events: three users watch three items, and two lines are broken."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [
        {"type": "item", "item_id": IMG, "ts": START_MS, "duration_ms": 30_000, "tags": ["<b>bold</b>", "t" * 10_000],
         "author_id": IMG},
        {"type": "item", "item_id": RTL_ITEM, "ts": START_MS, "duration_ms": 90_000, "tags": ["חתולים"], "author_id": "a1"},
        {"type": "item", "item_id": "long", "ts": START_MS, "duration_ms": 5_000, "tags": [], "author_id": None},
    ]
    events: list[Any] = [
        {"type": "watch", "user_id": user, "item_id": item["item_id"], "ts": START_MS + 60_000 * place + 7 * number,
         "watch_ms": 30_000, "duration_ms": 30_000}
        for number, user in enumerate((SCRIPT_USER, RTL_USER, PATH_USER, PLAIN_USER))
        for place, item in enumerate(items)
    ]  # fmt: skip
    lines = [json.dumps(event) for event in sorted(events, key=lambda event: event["ts"])]
    too_long = {"type": "watch", "user_id": "x" * 5_000, "item_id": "i", "ts": 1}
    lines += ["<script>window.hacked=1</script>", json.dumps(too_long)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    titles = {"long": LONG_TITLE, IMG: IMG + " title"}
    named = [json.dumps({"item_id": item_id, "title": title}) for item_id, title in titles.items()]
    (folder / "names.jsonl").write_text("\n".join(named) + "\n")
    return [str(folder / "items.jsonl"), str(folder / "events.jsonl")]


def replay(state: Path, files: list[str]) -> None:
    """Files into a state, to their end."""
    with Store(state, Semantics()) as store:
        Replay(store, files).run()


def line(step: int, ts: int, *, loss: float | None = 3.0, hit: float = 2.0) -> Line:
    """A batch of the trainer with ten scored windows."""
    scores = {name: {"hit@10": value} for name, value in (("onerec", hit), ("popularity", 1.0), ("covisitation", 0.0))}
    return Line(
        step=step, round=0, sequence=step, ts=ts, sessions=4, windows=10, codes=100, loss=loss, gradient=1.5,
        applied=loss is not None, expert_load=(0.8, 1.2), scored=10, scores=scores, reward_loss=2.0,
        preference=PreferenceLine(pairs=2, loss=0.69, margin=0.0, accuracy=0.5, age=0) if step % 3 == 0 else None,
    )  # fmt: skip


def write_run(run: Path, steps: int = 60) -> None:
    """Curves, and a ledger whose replica has a hostile name."""
    run.mkdir(parents=True, exist_ok=True)
    lines = [msgspec.json.encode(line(step, START_MS + 1_800_000 * step, loss=4 - step / 60)) for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    ages = [{"version": version, "replica": IMG, "first_answered_ms": START_MS + 10_000 * version,
             "age_s": {"session": {"p50": 1.0, "p95": 2.0}, "answered": {"p50": 9.0, "p95": 12.0 + version}}}
            for version in range(1, 9)]  # fmt: skip
    (run / "freshness.jsonl").write_text("".join(json.dumps(age) + "\n" for age in ages))


def write_repository(root: Path) -> None:
    """A repository whose only version was refused for a hostile reason."""
    (root / ".onerec").mkdir(parents=True, exist_ok=True)
    event = {"event": "rejected", "version": 1, "at_ms": START_MS, "step": 5, "reason": IMG + " was refused"}
    (root / ".onerec" / "versions.jsonl").write_text(json.dumps(event) + "\n")


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers as the model `recommend` does, with `version`, `watermark` and the items of the test's choice."""

    def __init__(self) -> None:
        self.version = 1
        self.watermark = START_MS + 100_000
        self.items = [IMG, RTL_ITEM, "long"]
        self.users: list[str] = []

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """One answer."""
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if tensor.name == "user_id":
                self.users.append(raw[4:].decode())
        names = np.array([[item.encode() for item in self.items]], dtype=np.object_)
        outputs: list[tuple[str, str, Any]] = [
            ("items", "BYTES", names.reshape(1, 1, -1)),
            ("scores", "FP32", np.array([[-3.5]], np.float32)),
            ("rewards", "FP32", np.array([[[0.1, 0.2, 0.3, 0.4]]], np.float32)),
            ("model_version", "INT64", np.array([[self.version]], np.int64)),
            ("watermark", "INT64", np.array([[self.watermark]], np.int64)),
        ]
        answer = service_pb2.ModelInferResponse(model_name="recommend", model_version=str(self.version))
        for name, kind, values in outputs:
            answer.outputs.add(name=name, datatype=kind, shape=list(values.shape))
            raw = serialize_byte_tensor(values).item() if kind == "BYTES" else values.tobytes()
            answer.raw_output_contents.append(raw)
        return answer

    def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The versions that are loaded."""
        answer = service_pb2.RepositoryIndexResponse()
        answer.models.add(name="recommend", version=str(self.version), state="READY", reason="")
        return answer


@contextlib.contextmanager
def triton(model: FakeTriton, port: int = 0) -> Iterator[str]:
    """The model on a port of 127.0.0.1; its address."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(model, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def served(page: Page) -> Iterator[str]:
    """The page on a free port, by a real server; its URL."""
    listener = bind("127.0.0.1", 0)
    server = make(page)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        page.close()
        assert not thread.is_alive()


def sources(folder: Path, *servers: str) -> Sources:
    """State, run and repository below a folder."""
    return Sources(state=folder / "state", run=folder / "run", repository=folder / "repository", servers=servers)


def hostile_world(folder: Path) -> Path:
    """All parts but Triton, full of hostile names; the folder."""
    replay(folder / "state", write_log(folder))
    write_run(folder / "run")
    write_repository(folder / "repository")
    return folder
