"""What a Triton replica says: the version that it answers with, those that it has loaded, and a user's sessions."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Final

from exporter.client import Client, Recommendation
from onerec.errors import OneRecError

ANSWER_SECONDS: Final = 2.0
SESSIONS_SHOWN: Final = 3


class Replica:
    """One server, asked with a short deadline; the connection is kept. Usable from several threads."""

    def __init__(self, address: str, repository: Path) -> None:
        self.address = address
        self._repository = repository
        self._client: Client | None = None
        self._lock = threading.Lock()

    def _connected(self) -> Client:
        with self._lock:
            if self._client is None:
                self._client = Client(self.address, timeout=ANSWER_SECONDS)
            return self._client

    def look(self) -> dict[str, Any]:
        """Version and watermark of an answer, its time in ms, and the newest version loaded. Failure where it is down."""
        client = self._connected()
        began = time.perf_counter()
        answer = client.recommend(history=[])
        took = time.perf_counter() - began
        ready = [entry.version for entry in client.versions() if entry.state == "READY"]
        loaded = max(ready, default=None)
        return {
            "version": answer.model_version,
            "watermark": answer.watermark,
            "history_watermark": answer.history_watermark,
            "answer_ms": round(took * 1000, 1),
            "ready": ready,
            "loaded": loaded,
            "loaded_watermark": self._watermark_of(loaded) if loaded != answer.model_version else answer.watermark,
        }

    def _watermark_of(self, version: int | None) -> int | None:
        """What a loaded version has learnt up to, as its manifest says; None where that cannot be read."""
        from exporter.bundle import read_manifest
        from exporter.triton_config import MODEL_NAME

        if version is None:
            return None
        try:
            return read_manifest(self._repository / MODEL_NAME / str(version)).watermark
        except OneRecError:
            return None

    def recommend(self, user_id: str) -> Recommendation:
        """The sessions that a user is recommended now. UserError for an id that is refused, Failure where it is down."""
        return self._connected().recommend(user_id=user_id, count=SESSIONS_SHOWN)

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None
