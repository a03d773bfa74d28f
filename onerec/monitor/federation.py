"""One page for all processes of `onerec run`: each one's metrics with a `process` label, and Triton's as they are.

A process that is gone, or does not answer, has no figures: stale is absent. Only a job that is done keeps its last ones.
"""

from __future__ import annotations

import http.client
import http.server
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from onerec.closing import Closing
from onerec.errors import UserError

POLL_SECONDS: Final = 1.5
ANSWER_SECONDS: Final = 1.0
LARGEST_PAGE: Final = 8 << 20
TRITON: Final = "triton"
RUN: Final = "run"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SAMPLE: Final = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(\{)?")
_HAS_PROCESS: Final = re.compile(r'[{,]\s*process="')


def labelled(line: str, process: str) -> str:
    """A sample's line with the label `process`; one that has it already stays."""
    match = _SAMPLE.match(line)
    if match is None:
        raise ValueError(f"no sample: {line[:80]}")
    name, rest = match[1], line[match.end() :]
    if match[2] is None:
        return f'{name}{{process="{process}"}}{rest}'
    if _HAS_PROCESS.search(line):
        return line
    return f'{name}{{process="{process}"{"" if rest.startswith("}") else ","}{rest}'


def union(pages: Mapping[str, str], plain: Iterable[str] = ()) -> str:
    """Expositions by process → one, in which a family stands once; `plain` ones go in without a label.

    A page that cannot be read is left out whole: half of it would be worse than none.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for process, page in [*sorted(pages.items()), *((None, page) for page in plain)]:
        try:
            found = list(_families(page))
            lines = [(family, [line if process is None else labelled(line, process) for line in lines])
                     for family, _, lines in found]
        except ValueError:
            continue
        for (family, head, _), (_, labels) in zip(found, lines, strict=True):
            heads.setdefault(family, head)
            samples.setdefault(family, []).extend(labels)
    return "".join(f"{line}\n" for family, head in heads.items() if samples[family] for line in [*head, *samples[family]])


def _families(page: str) -> Iterable[tuple[str, list[str], list[str]]]:
    """(name, HELP and TYPE lines, sample lines) of an exposition, in its order."""
    family, head, lines = "", list[str](), list[str]()
    for line in page.splitlines():
        words = line.split(" ", 3)
        if line.startswith(("# HELP ", "# TYPE ")):
            if len(words) < 3:
                raise ValueError(f"no family: {line[:80]}")
            if words[2] != family:
                if family:
                    yield family, head, lines
                family, head, lines = words[2], [], []
            head.append(line)
        elif line and not line.startswith("#"):
            if not family:
                raise ValueError(f"a sample without a family: {line[:80]}")
            lines.append(line)
    if family:
        yield family, head, lines


def fetch(url: str, seconds: float = ANSWER_SECONDS) -> str:
    """A page of metrics. Raises OSError where nobody answers in time, or not to the end."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as answer:  # noqa: S310 - http, made by us
            page = str(answer.read(LARGEST_PAGE).decode("utf-8", "replace"))
            if answer.length:
                raise OSError(f"{url} ended {answer.length} bytes early")
            return page
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason)) from None
    except (ValueError, http.client.HTTPException) as error:
        # Of a process that was killed in the middle of its answer, or that is no server of metrics at all.
        raise OSError(f"{type(error).__name__}: {error}") from None


class Federation(Closing):
    """Polls the addresses in `folder`, and serves the union of what they say on `host`:`port`.

    Args:
        folder: where each process writes NAME.address (`host:port pid`).
        port: 0 takes a free one.
        triton: its metrics' URL, or None.
        done: whether a job has ended well, so that its last figures stay.
        own: the exposition of the process that federates, which is called `run`.
        get: URL → page; raises OSError.

    Raises UserError where the port is taken. Nothing is polled before `start`.
    """

    def __init__(self, folder: Path, port: int, *, host: str = "127.0.0.1", triton: str | None = None,
                 done: Callable[[str], bool] = lambda name: False, own: Callable[[], str] = lambda: "",
                 get: Callable[[str], str] = fetch) -> None:
        self._folder, self._triton, self._done, self._own, self._get = folder, triton, done, own, get
        self._pages: dict[str, str] = {}
        self._silent: frozenset[str] = frozenset()
        self._closed = threading.Event()
        self._poller = threading.Thread(target=self._poll_on, daemon=True)
        federation = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.split("?")[0] not in ("/metrics", "/"):
                    self.send_error(404)
                    return
                body = federation.page().encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nobody wants a line for each scrape."""

        try:
            self._server = http.server.ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise UserError(f"--metrics-port {port}: {error.strerror}; name another, or 0 for a free one") from None
        self.address = f"{host}:{self._server.server_port}"

    def start(self) -> None:
        """Begins to poll and to serve."""
        self._poller.start()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Ends both."""
        self._closed.set()
        if self._poller.is_alive():
            self._server.shutdown()
            self._poller.join(2 * ANSWER_SECONDS)
        self._server.server_close()

    def page(self) -> str:
        """The union as it was at the last poll."""
        pages = dict(self._pages)
        triton = pages.pop(TRITON, "")
        return union({**pages, RUN: self._own()}, [triton])

    def silent(self) -> frozenset[str]:
        """Processes that are there and did not answer the last poll."""
        return self._silent

    def poll(self) -> None:
        """Asks everybody once."""
        urls = {path.stem: f"http://{words[0]}/metrics" for path in self._folder.glob("*.address") if (words := _alive(path))}
        if self._triton is not None:
            urls[TRITON] = self._triton
        pages: dict[str, str] = {name: page for name, page in self._pages.items() if name not in urls and self._done(name)}
        silent = set()
        if urls:
            with ThreadPoolExecutor(len(urls)) as pool:
                asked = {name: pool.submit(self._get, url) for name, url in urls.items()}
                for name, answer in asked.items():
                    try:
                        pages[name] = answer.result()
                    except OSError:
                        silent.add(name)
        self._pages, self._silent = pages, frozenset(silent - {TRITON})

    def _poll_on(self) -> None:
        while not self._closed.is_set():
            self.poll()
            self._closed.wait(POLL_SECONDS)


def _alive(path: Path) -> list[str]:
    """The words of an address file whose process is there still; none of what a killed one left."""
    try:
        words = path.read_text(errors="replace").split()
    except OSError:
        return []
    return words if len(words) == 2 and words[1].isdigit() and Path(f"/proc/{words[1]}").exists() else []
