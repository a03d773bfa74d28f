"""Children of `onerec run`: with --kafka a broker where none is named and what carries events through it; the sampler."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from onerec.supervisor import Job

Command = Callable[..., tuple[str, ...]]


def answers(bootstrap: str) -> bool:
    """Whether somebody listens at the first of the addresses."""
    host, _, port = bootstrap.split(",")[0].rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except OSError:
        return False


def kafka_jobs(
    command: Command,
    *,
    inputs: Sequence[str | Path],
    ready: Callable[[], bool],
    done: Callable[[str], bool],
    bootstrap: str,
    own_broker: bool,
    workers: int,
    partitions: int,
    state: Path,
    run_dir: Path,
    options: Sequence[str],
    shared: Sequence[str],
    end: bool,
) -> tuple[list[Job], Path]:
    """Jobs from files to the session log in `state`, and the folder of the histories that serving reads.

    `inputs` and `options` are those of `onerec produce`; nothing is produced before `ready()`, and `end` says that the
    inputs have one.
    """
    replica = run_dir / "replica"
    there = ["--bootstrap", bootstrap, *shared]

    def up() -> bool:
        return answers(bootstrap)

    def topics() -> bool:
        return done("topics")

    jobs: list[Job] = []
    if own_broker:
        port = bootstrap.rpartition(":")[2]
        # Last of all, so that whoever writes can end its transaction.
        jobs.append(
            Job(name="kafka", outlives=True, command=command("kafka", "up", "--dir", run_dir / "kafka", "--port", port))
        )
    # A broker that is away is no fault of theirs: whoever starts meanwhile tries again.
    jobs += [
        Job(name="topics", kind="once", ready=up, retry_user_errors=own_broker,
            command=command("topics", "--create", "--partitions", str(partitions), *there)),
        Job(name="ingest", ready=topics, retry_user_errors=True, command=command("ingest", *there)),
        *(
            Job(name=f"stream-{number}", ready=topics, retry_user_errors=True,
                command=command("stream", "--state", run_dir / f"worker-{number}", *there,
                                "--set", f"metrics.name=stream-{number}"))
            for number in range(1, workers + 1)
        ),
        Job(name="feed", ready=topics, retry_user_errors=True, command=command("feed", "--state", state, *there)),
        Job(name="histories-replica", ready=topics, retry_user_errors=True,
            command=command("histories-replica", "--state", replica, *there)),
        Job(name="produce", kind="once", ready=lambda: topics() and ready(),
            command=command("produce", *inputs, *(["--end"] if end else []), *options, *there)),
    ]
    return jobs, replica


def sampler_jobs(
    command: Command,
    *,
    state: Path,
    run_dir: Path,
    bootstrap: str | None,
    shared: Sequence[str],
    trained: Callable[[], bool],
) -> list[Job]:
    """The preference sampler, on the state's session log or, with `bootstrap`, on Kafka's; begins once it is `trained()`."""
    folders = ["--state", state, "--run", run_dir]
    where = ["--bootstrap", bootstrap] if bootstrap else ["--follow"]
    # Below all others: on a machine with few cores it is the trainer that must not wait. A pair that is late is dropped.
    jobs = [
        Job(name="sampler", ready=trained, retry_user_errors=True, nice=10,
            command=command("sampler", *folders, *where, *shared)),
    ]
    if bootstrap:
        jobs.append(
            Job(name="pairs-replica", ready=trained, retry_user_errors=True,
                command=command("pairs-replica", "--run", run_dir, *where, *shared))
        )
    return jobs
