"""The page over HTTP: GET only, this host's names only, nothing from or to anywhere else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onerec.dashboard.page import Page
from onerec.dashboard.parts import reason
from onerec.errors import UserError

STATIC: Final = Path(__file__).parent / "static"
BEAT_SECONDS: Final = 1.0
STREAMS: Final = 64
"""Pages that are kept up to date at a time; further ones are told to come back."""
ID_BYTES: Final = 256
HEADERS: Final = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
                               "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def is_own_host(header: str, named: str) -> bool:
    """Whether a Host header may be ours: a number, localhost or the name that we were told to listen on.

    Any other name may be a stranger's that points here, so that his page could read ours (DNS rebinding).
    """
    host = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() and not header.endswith("]") else header
    host = host.strip("[]").lower().rstrip(".")
    if host in ("localhost", named.lower()):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Guard:
    """Refuses foreign hosts and everything but GET, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if not is_own_host(host, self._host):
            said = "this page is for its own host only: open it by its number, or name the host with --host\n"
            refused: ASGIApp = PlainTextResponse(said, status_code=421)
        elif scope["method"] not in ("GET", "HEAD"):
            refused = PlainTextResponse("this page only shows: GET\n", status_code=405, headers={"allow": "GET, HEAD"})
        else:
            refused = self._app
        await refused(scope, receive, guarded)


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS), status, media_type="application/json")


async def _answer(question: Awaitable[Any]) -> Response:
    """The value as JSON; what went wrong as {fault}."""
    try:
        return _json({"data": await question, "fault": None})
    except Exception as error:
        return _json({"data": None, "fault": "no answer in time" if isinstance(error, TimeoutError) else reason(error)})


def build(page: Page, host: str = "127.0.0.1", *, ended: Callable[[], bool] = lambda: False) -> Starlette:
    """The application; `ended` tells streams that the server is to stop."""
    streams: set[int] = set()

    async def index(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def snapshot(request: Request) -> Response:
        return _json({"settings": page.settings(), "parts": await page.look()})

    async def live(request: Request) -> Response:
        if len(streams) >= STREAMS:
            return PlainTextResponse("too many pages are open\n", status_code=503, headers={"retry-after": "10"})
        return StreamingResponse(beats(request), media_type="text/event-stream")

    async def beats(request: Request) -> AsyncIterator[bytes]:
        streams.add(id(request))
        try:
            told: dict[str, bytes] = {}
            yield b"retry: 2000\nevent: settings\ndata: " + orjson.dumps(page.settings()) + b"\n\n"
            while not ended():
                parts = {name: orjson.dumps(part) for name, part in (await page.look()).items()}
                changed = {name: orjson.Fragment(text) for name, text in parts.items() if told.get(name) != text}
                told = parts
                yield b"event: parts\ndata: " + orjson.dumps(changed) + b"\n\n"
                await asyncio.sleep(BEAT_SECONDS)
        finally:
            streams.discard(id(request))

    async def users(request: Request) -> Response:
        return await _answer(page.users(request.query_params.get("prefix", "")[:ID_BYTES]))

    async def random_user(request: Request) -> Response:
        return await _answer(page.random_user())

    async def user(request: Request) -> Response:
        user_id = request.query_params.get("id", "")
        if not 1 <= len(user_id.encode(errors="replace")) <= ID_BYTES:
            return _json({"data": None, "fault": f"a user id has 1 to {ID_BYTES} bytes"}, 400)
        return await _answer(page.user(user_id))

    return Starlette(
        routes=[
            Route("/", index), Route("/api/snapshot", snapshot), Route("/api/live", live), Route("/api/users", users),
            Route("/api/users/random", random_user), Route("/api/user", user),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, host=host)],
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the port is taken, or the address is not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"dashboard: --host {host} is no address ({error.strerror}); leave it out for 127.0.0.1") from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(128)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"dashboard: port {port} of {host} is in use; name another with --port, 0 takes any") from None
        raise UserError(f"dashboard: cannot listen on {host}:{port} ({error.strerror}); see --host, --port") from None
    return found


def make(page: Page, host: str = "127.0.0.1") -> uvicorn.Server:
    """The server; `should_exit` ends it, open streams included."""
    app = build(page, host, ended=lambda: server.should_exit)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                                           timeout_graceful_shutdown=2, lifespan="off"))
    return server


def serve(page: Page, listener: socket.socket, host: str) -> None:
    """Serve until SIGINT or SIGTERM."""
    # uvicorn raises the signal again once it has ended well.
    with contextlib.suppress(KeyboardInterrupt):
        make(page, host).run(sockets=[listener])
    page.close()
