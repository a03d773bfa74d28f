"""Asking a running Triton over gRPC: sessions, and what a publisher needs to load and watch versions."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import msgspec
import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from exporter.triton_config import MODEL_NAME
from onerec.errors import Failure, UserError

DEFAULT_URL = "127.0.0.1:8001"
REQUEST_SECONDS = 10.0
LOAD_SECONDS = 600.0
CHANNEL = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
"""Without bounds on the size of messages, as the client has it; a server that is back is found within a second, not minutes."""


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions for one user, best first.

    items [count][m], scores [count] (log-likelihood), rewards [count][4] (swt, vtr, wtr, ltr; None: the version has no
    reward model), the version that answered, the event time in ms it has learnt up to (None: nothing yet), and that of the
    newest event in the host's stored histories (None: no state, no event, or a version from before this was told).
    """

    items: list[list[str]]
    scores: list[float]
    rewards: list[list[float]] | None
    model_version: int
    watermark: int | None
    history_watermark: int | None = None


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What a version says of itself; times in ms, None: nothing learnt yet, no stored histories."""

    model_version: int
    watermark: int | None
    history_watermark: int | None


class VersionState(msgspec.Struct, frozen=True, kw_only=True):
    """One version as Triton sees it: READY, LOADING, UNAVAILABLE …, with its reason."""

    version: int
    state: str
    reason: str


def grpc_address(url: str) -> str:
    """host:port of a server's gRPC end; UserError for what is not one."""
    address = url.removeprefix("grpc://").rstrip("/")
    host, colon, port = address.rpartition(":")
    if "://" in address or not (colon and host and port.isdigit()):
        raise UserError(f"server {url!r}: give Triton's gRPC address as host:port, for example {DEFAULT_URL}")
    return address


def _texts(values: Sequence[str]) -> np.ndarray[Any, np.dtype[np.object_]]:
    return np.array([[value.encode() for value in values]], dtype=np.object_).reshape(1, len(values))


def _tensor(name: str, values: np.ndarray[Any, Any], kind: str) -> grpcclient.InferInput:
    tensor = grpcclient.InferInput(name, list(values.shape), kind)
    tensor.set_data_from_numpy(values)
    return tensor


def _time(values: np.ndarray[Any, Any]) -> int | None:
    """The time in a tensor [1, 1]; below 0 stands for none."""
    return None if (value := int(values[0, 0])) < 0 else value


def _who(user_id: str | None, history: Sequence[str] | None) -> list[grpcclient.InferInput]:
    """The inputs that say whose history is meant."""
    inputs = []
    if user_id is not None:
        inputs.append(_tensor("user_id", _texts([user_id]), "BYTES"))
    if history is not None:
        inputs.append(_tensor("history", _texts(history), "BYTES"))
    if not inputs:
        raise UserError("neither a user nor a history: give one of them")
    return inputs


class Client:
    """One connection; usable from several threads, closed by `close` or as a context manager."""

    def __init__(self, url: str = DEFAULT_URL, *, timeout: float = REQUEST_SECONDS) -> None:
        self.url = grpc_address(url)
        self._timeout = timeout
        self._client = grpcclient.InferenceServerClient(self.url, channel_args=CHANNEL)

    def recommend(
        self,
        user_id: str | None = None,
        history: Sequence[str] | None = None,
        count: int = 1,
        *,
        select: str | None = None,
        version: int | None = None,
    ) -> Recommendation:
        """Sessions for a stored user or for a given history, oldest first; `version` None = the newest one served.

        Raises UserError for a request that the model refuses, Failure where Triton or the model does not answer.
        """
        inputs = _who(user_id, history)
        inputs.append(_tensor("count", np.array([[count]], dtype=np.int32), "INT32"))
        if select is not None:
            inputs.append(_tensor("select", _texts([select]), "BYTES"))
        try:
            result = self._client.infer(
                MODEL_NAME, inputs, model_version=str(version or ""), client_timeout=self._timeout
            )
        except InferenceServerException as error:
            self._refuse(error)
        rewards = result.as_numpy("rewards")[0]
        told = result.as_numpy("history_watermark")
        return Recommendation(
            items=[[item.decode() for item in session] for session in result.as_numpy("items")[0]],
            scores=result.as_numpy("scores")[0].tolist(),
            rewards=None if np.isnan(rewards).all() else rewards.tolist(),
            model_version=int(result.as_numpy("model_version")[0, 0]),
            watermark=_time(result.as_numpy("watermark")),
            # Versions that were published before this output was there lack it.
            history_watermark=None if told is None else _time(told),
        )

    def tell(self, user_id: str | None = None, history: Sequence[str] | None = None) -> Told:
        """What the version that would answer, and the histories it would use, have come to; nothing is searched.

        Of a version that was published before it knew how, a whole answer is asked for. Raises as `recommend` does.
        """
        inputs = _who(user_id, history)
        outputs = [grpcclient.InferRequestedOutput(name) for name in ("model_version", "watermark", "history_watermark")]
        try:
            result = self._client.infer(MODEL_NAME, inputs, outputs=outputs, client_timeout=self._timeout)
        except InferenceServerException as error:
            if "history_watermark" in str(error):
                whole = self.recommend(user_id, history)
                return Told(
                    model_version=whole.model_version, watermark=whole.watermark, history_watermark=whole.history_watermark
                )
            self._refuse(error)
        told = result.as_numpy("history_watermark")
        return Told(
            model_version=int(result.as_numpy("model_version")[0, 0]),
            watermark=_time(result.as_numpy("watermark")),
            history_watermark=None if told is None else _time(told),
        )

    def alive(self) -> bool:
        """Whether the server answers at all."""
        try:
            return bool(self._client.is_server_live(client_timeout=self._timeout))
        except InferenceServerException:
            return False

    def load(self) -> None:
        """Load what the repository holds now; the versions before serve until the new ones are ready.

        Raises Failure with Triton's words when a version is refused or the server goes away.
        """
        try:
            self._client.load_model(MODEL_NAME, client_timeout=LOAD_SECONDS)
        except InferenceServerException as error:
            self._refuse(error)

    def versions(self) -> list[VersionState]:
        """The versions of the model that Triton knows, ascending."""
        try:
            index = self._client.get_model_repository_index(client_timeout=self._timeout)
        except InferenceServerException as error:
            self._refuse(error)
        found = [
            VersionState(version=int(model.version), state=model.state or "UNAVAILABLE", reason=model.reason)
            for model in index.models
            if model.name == MODEL_NAME and model.version
        ]
        return sorted(found, key=lambda entry: entry.version)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse(self, error: InferenceServerException) -> NoReturn:
        # The Python backend appends its own stack below "At:".
        text, status = str(error.message()).partition("\n\nAt:")[0].strip(), str(error.status() or "")
        if "INVALID_ARGUMENT" in status:
            raise UserError(text.removeprefix("[request id: <id_unknown>] ")) from None
        if "unknown model" in text or "is not found" in text or "no available versions" in text:
            raise Failure(
                f"Triton at {self.url} serves no such version of {MODEL_NAME!r} ({text}); publish one: "
                f"onerec publish --run DIR --repository DIR --server {self.url}"
            ) from None
        if "queue size" in text:
            raise Failure(
                f"Triton at {self.url} is overloaded ({text}); ask again later, or serve from more replicas"
            ) from None
        if "UNAVAILABLE" in status or "DEADLINE_EXCEEDED" in status or "CANCELLED" in status:
            raise Failure(
                f"Triton at {self.url} does not answer ({text.splitlines()[0] if text else status}); "
                "start it with `onerec serve`, or name another by --server HOST:PORT"
            ) from None
        raise Failure(f"Triton at {self.url}: {text or status}") from None
