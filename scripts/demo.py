"""The demo: a log goes in, recommended sessions come out of a real Triton. Every command is printed before it runs.

Usage: demo.py --onerec PATH [--events FILE [--items FILE] [--format NAME] [--set a.b=c …]] [--folder .demo] [--quick]
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
from pathlib import Path

SERVER_SECONDS = 90


class Demo:
    """Runs `onerec` sub-commands, says what they are and how long they took."""

    def __init__(self, onerec: str, log: Path) -> None:
        self.onerec = onerec
        self.log = log
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
        """Start a command beside the demo; its output goes to the log."""
        self.say([*command, "&"])
        with self.log.open("wb") as log:
            return subprocess.Popen([self.onerec, *command], stdout=log, stderr=log, start_new_session=True)  # noqa: S603


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for_model(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Until the model answers on the HTTP port; ends the demo with the server's log when it does not come up."""
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/recommend/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"demo: the server did not come up:\n{log.read_text(errors='replace')}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server as Ctrl-C would."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


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
    """simulate → replay → items → train → publish → serve → recommend → status."""
    options = arguments()
    folder: Path = options.folder
    state, run, repository = (str(folder / name) for name in ("state", "run", "repository"))
    for path in (state, run, repository):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(options.onerec, folder / "serve.log")
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

    http, grpc, metrics = free_ports(3)
    url = f"127.0.0.1:{grpc}"
    server = demo.start("serve", "--repository", repository, "--state", state, "--http-port", str(http),
                        "--grpc-port", str(grpc), "--metrics-port", str(metrics))
    try:
        wait_for_model(http, server, demo.log)
        histories = demo.ask("histories", "--state", state, "--limit", "100", "--json").splitlines()
        user = max(map(json.loads, histories), key=lambda line: len(line["items"]))["user_id"]
        demo.run("history", user, "--state", state)
        demo.run("recommend", user, "--count", "2", "--server", url, "--repository", repository, "--state", state)
        demo.run("recommend", user, "--count", "1", "--select", "reward", "--server", url, "--repository", repository,
                 "--state", state)
        demo.run("status", "--state", state, "--run", run, "--repository", repository, "--server", url)
    finally:
        stop(server)
    print(f"\nDemo done in {time.monotonic() - demo.began:.0f} s. Left for you: {state}, {run}, {repository}")
    print(f"Serve it again: onerec serve --repository {repository} --state {state}")


if __name__ == "__main__":
    main()
