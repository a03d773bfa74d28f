"""Consumer lag, from the metrics of `onerec run --metrics-port` or of the processes that RUN/metrics names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from onerec.errors import Failure, UserError
from onerec.monitor import federation

SCRAPE_SECONDS: Final = 2.0
LAG_SECONDS: Final = "onerec_lag_seconds"
LAG_OFFSETS: Final = "onerec_lag_offsets"


def metrics_url(text: str) -> str:
    """`--metrics` as a URL: host:port is enough. UserError for what is not http."""
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    try:
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"--metrics {text!r}: give the address of `onerec run --metrics-port`, for example http://127.0.0.1:9100")
    return url if parts.path else f"{url}/metrics"


def fetch(url: str) -> str:
    """A page of metrics. Raises Failure where nobody answers."""
    try:
        return federation.fetch(url, SCRAPE_SECONDS)
    except OSError as error:
        raise Failure(f"metrics at {url} do not answer ({error}); is `onerec run --metrics-port` up?") from None


def lags(pages: Iterable[str]) -> dict[str, Any] | None:
    """Lag by source: seconds, and records summed over partitions; None where no page knows any."""
    sources: dict[str, dict[str, Any]] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name not in (LAG_SECONDS, LAG_OFFSETS) or sample.value != sample.value:
                    continue
                entry = sources.setdefault(sample.labels.get("source", ""), {"seconds": None, "records": None})
                if sample.name == LAG_SECONDS:
                    entry["seconds"] = max(sample.value, entry["seconds"] if entry["seconds"] is not None else sample.value)
                else:
                    entry["records"] = (entry["records"] or 0) + sample.value
    return {"sources": [{"source": name, **entry} for name, entry in sorted(sources.items())]} if sources else None


class LagView:
    """Asks `url` where there is one, else every process whose address is in RUN/metrics."""

    def __init__(self, run_dir: Path, url: str | None) -> None:
        self._folder = run_dir / "metrics"
        self._url = url

    def look(self) -> dict[str, Any] | None:
        """Lags, None where there is nobody to ask. Failure where nobody of those to ask answers."""
        if self._url is not None:
            return lags([fetch(self._url)])
        pages, faults = [], []
        for file in sorted(self._folder.glob("*.address")):
            words = file.read_text(errors="replace").split()
            if not words:
                continue
            try:
                pages.append(fetch(metrics_url(words[0])))
            except (UserError, Failure) as error:
                faults.append(error)
        if faults and not pages:
            raise faults[0]
        return lags(pages)
