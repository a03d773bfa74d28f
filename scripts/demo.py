"""The demo: a log goes in, recommended sessions come out of a real Triton. Every command is printed before it runs.

Usage: demo.py --onerec PATH [--events FILE [--items FILE] [--format NAME] [--set a.b=c …]] [--folder .demo] [--quick]

It ends with a page to look at: in a terminal the page and Triton stay until Ctrl-C, elsewhere they are ended at once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

SERVER_SECONDS = 90


class Demo:
    """Runs `onerec` sub-commands, says what they are and how long they took."""

    def __init__(self, onerec: str, logs: Path) -> None:
        self.onerec = onerec
        self.logs = logs
        self.running: list[subprocess.Popen[bytes]] = []
        self.began = time.monotonic()

    def say(self, command: list[str]) -> None:
        """Print a command the way one would type it."""
        print(f"\n\033[1m$ onerec {shlex.join(command)}\033[0m", flush=True)

    def run(self, *command: str) -> None:
        """Run one command to its end; a failure ends the demo with its status."""
        self.say(list(command))
        began = time.monotonic()
        status = subprocess.run([self.onerec, *command], check=False).returncode  # noqa: S603
        print(f"  ({time.monotonic() - began:.1f} s)", flush=True)
        if status:
            sys.exit(status)

    def ask(self, *command: str) -> str:
        """What a command prints, without showing it."""
        return subprocess.run([self.onerec, *command], check=True, capture_output=True, text=True).stdout  # noqa: S603

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command beside the demo; its output goes to COMMAND.log. `stop` ends it."""
        self.say([*command, "&"])
        with self.log_of(command[0]).open("wb") as log:
            process = subprocess.Popen([self.onerec, *command], stdout=log, stderr=log, start_new_session=True)  # noqa: S603
        self.running.append(process)
        return process

    def log_of(self, command: str) -> Path:
        """Where a command beside the demo writes to."""
        return self.logs / f"{command}.log"

    def stop(self) -> None:
        """End what was started, the newest first."""
        while self.running:
            end(self.running.pop())

    def wait_for(self, url: str, process: subprocess.Popen[bytes], name: str) -> None:
        """Until something answers there; ends the demo with the command's log when it does not."""
        deadline = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - an address of our own
                    return
            except OSError:
                time.sleep(0.2)
        sys.exit(f"demo: `onerec {name}` did not come up:\n{self.log_of(name).read_text(errors='replace')}")


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command as Ctrl-C would."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def arguments() -> argparse.Namespace:
    """The options, see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--onerec", default="onerec")
    parser.add_argument("--folder", type=Path, default=Path(".demo"))
    parser.add_argument("--events", nargs="*", default=[])
    parser.add_argument("--items")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--quick", action="store_true", help="a smaller world")
    return parser.parse_args()


def main() -> None:
    """simulate → replay → items → train → publish → serve → recommend → status → dashboard."""
    options = arguments()
    folder: Path = options.folder
    state, run, repository = (str(folder / name) for name in ("state", "run", "repository"))
    for path in (state, run, repository):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(options.onerec, folder)
    settings = [part for setting in options.settings for part in ("--set", setting)]

    events, items = options.events, options.items
    if not events:
        events, items = [str(folder / "world.jsonl.gz")], str(folder / "world.items.jsonl.gz")
        users, videos, days = ("500", "600", "3") if options.quick else ("1500", "2000", "5")
        demo.run("simulate", "--out", events[0], "--users", users, "--items", videos, "--days", days, "--seed", "1")
    demo.run("replay", *events, "--state", state, *(["--items", items] if items else []), "--format", options.format,
             *settings)
    demo.run("items", "--state", state, *settings)
    # A short log: larger steps than the default, which is for logs without end.
    demo.run("train", "--state", state, "--run", run, "--preset", "tiny", "--set", "train.learning_rate=0.001", *settings)
    demo.run("publish", "--run", run, "--repository", repository, *settings)

    http, grpc, metrics, page = free_ports(4)
    url = f"127.0.0.1:{grpc}"
    parts = ["--state", state, "--run", run, "--repository", repository, "--server", url]
    try:
        server = demo.start("serve", "--repository", repository, "--state", state, "--http-port", str(http),
                            "--grpc-port", str(grpc), "--metrics-port", str(metrics))
        demo.wait_for(f"http://127.0.0.1:{http}/v2/models/recommend/ready", server, "serve")
        demo.start("monitor", *parts)
        histories = demo.ask("histories", "--state", state, "--limit", "100", "--json").splitlines()
        user = max(map(json.loads, histories), key=lambda line: len(line["items"]))["user_id"]
        demo.run("history", user, "--state", state)
        demo.run("recommend", user, "--count", "2", "--server", url, "--repository", repository, "--state", state)
        demo.run("recommend", user, "--count", "1", "--select", "reward", "--server", url, "--repository", repository,
                 "--state", state)
        demo.run("status", *parts)
        dashboard = demo.start("dashboard", *parts, "--port", str(page))
        address = f"http://127.0.0.1:{page}/"
        demo.wait_for(address, dashboard, "dashboard")
        print(f"\nDemo done in {time.monotonic() - demo.began:.0f} s. Left for you: {state}, {run}, {repository}")
        if sys.stdout.isatty():
            print(f"The page to look at: {address} (until Ctrl-C)", flush=True)
            with suppress(KeyboardInterrupt):
                dashboard.wait()
    finally:
        demo.stop()
    print(f"Serve it again: onerec serve --repository {repository} --state {state}")
    print(f"The page to look at, then: onerec dashboard --state {state} --run {run} --repository {repository}")
    print(f"  at http://127.0.0.1:8050/ (it was at {address} just now)")


if __name__ == "__main__":
    main()
