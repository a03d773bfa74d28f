"""Pictures of `onerec dashboard` for the README: a small simulated world at live pace, looked at once it has learnt.

Usage: screenshots.py --onerec PATH [--rate 100] [--seconds 240] [--folder .screenshots] [--out docs/figures]
       screenshots.py --url http://127.0.0.1:8050    (of a page that is served already)

Needs Playwright and Debian's chromium-headless-shell.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

PICTURES = (("light", 1600, 1000), ("dark", 1600, 1000), ("narrow", 400, 900))
TOP_PIXELS = 1_560
"""Of a narrow page, which is long."""


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def told(url: str) -> Any:
    """JSON of an address; None where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own page
            return json.loads(answer.read())
    except OSError:
        return None


def wait_for_versions(url: str, run: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the world has run for so long; ends the script where nothing is served by then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and run.poll() is None:
        time.sleep(1)
    found = told(f"{url}/api/snapshot")
    if found is None or found["parts"]["chain"]["data"]["headline_ms"] is None:
        sys.exit(f"screenshots: nothing is served after {seconds:.0f} s; give it longer with --seconds")


def photograph(url: str, out: Path) -> None:
    """The page in both themes, and narrow, with somebody of the newest sessions."""
    from playwright.sync_api import sync_playwright

    user = urllib.parse.quote(told(f"{url}/api/users/random")["data"])
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium-headless-shell"), args=["--no-sandbox"])
        for name, width, height in PICTURES:
            theme = "dark" if name == "dark" else "light"
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
            page = context.new_page()
            page.goto(f"{url}/?user={user}")
            page.wait_for_selector("#sides .items li")
            # The course of the age begins when the page is opened.
            page.wait_for_timeout(15_000)
            size = page.evaluate("document.documentElement.scrollHeight")
            clip = {"x": 0, "y": 0, "width": width, "height": min(size, TOP_PIXELS) if name == "narrow" else size}
            save(page.screenshot(full_page=True, clip=clip), out / f"dashboard-{name}.png")
            context.close()
        browser.close()


def save(picture: bytes, path: Path) -> None:
    """A PNG of 256 colours, which is less than half of the bytes and looks the same."""
    from PIL import Image

    few = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def main() -> None:
    """run → wait → photograph → stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onerec", default="onerec")
    parser.add_argument("--rate", default="100", help="events a second")
    parser.add_argument("--seconds", type=float, default=240.0, help="how long the world runs before it is looked at")
    parser.add_argument("--folder", type=Path, default=Path(".screenshots"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--url", help="a page that is served already; nothing is run then")
    options = parser.parse_args()

    if options.url:
        photograph(options.url.rstrip("/"), options.out)
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    parts = [part for name in ("state", "run", "repository") for part in (f"--{name}", str(options.folder / name))]
    command = [options.onerec, "run", "--simulate", "--rate", options.rate, "--publish-every", "10", "--metrics-port", "0",
               "--http-port", "0", "--grpc-port", "0", "--triton-metrics-port", "0", "--dashboard-port", str(port), *parts]
    with (options.folder / "run.log").open("wb") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603
    try:
        wait_for_versions(url, run, options.seconds)
        photograph(url, options.out)
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(60)


if __name__ == "__main__":
    main()
