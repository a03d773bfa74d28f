"""`onerec monitor`: asks every replica what users are answered, and tells how old that is."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from onerec.config import load_config
from onerec.console import ConfigOption, MetricsPortOption, RepositoryOption, RunOption, SetOption, StateOption, err
from onerec.errors import UserError

LOOK_SECONDS = 1.0
"""Between two looks at the state: how finely the first hand-offs are told apart. One costs some 7 ms of processor."""
SERVER = "127.0.0.1:8001"

ServersOption = Annotated[
    list[str] | None,
    typer.Option("--server", help=f"Triton's gRPC address; repeat it for every replica. Default {SERVER}.", show_default=False),
]


def replicas(servers: list[str] | None) -> list[str]:
    """The replicas' addresses, each once. Raises UserError for what is no host:port."""
    from exporter.client import grpc_address

    return list(dict.fromkeys(grpc_address(server) for server in servers or [SERVER]))


def monitor(
    state: StateOption,
    run_dir: RunOption,
    repository: RepositoryOption,
    server: ServersOption = None,
    new_reference: Annotated[
        bool, typer.Option("--new-reference", help="Hold drift against the sessions of today, not against those kept.")
    ] = False,
    metrics_port: MetricsPortOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Ask every replica for a real answer, again and again, and tell how old the knowledge is that it comes from.

    When a version is first seen to answer at a replica, the age of every event that it learnt newly goes into the histogram
    of the stage `answered`, and a line into RUN/freshness.jsonl. Drift of what users do is told against a reference window,
    RUN/drift.json. Nothing else is written; a part that is missing is waited for, and has no data meanwhile.

    Examples:

        onerec monitor --state state --run run --repository repository --metrics-port 9107

        onerec monitor --state state --run run --repository repository --server 10.0.0.1:8001 --server 10.0.0.2:8001
    """
    from onerec.monitor.drift import DRIFT_FILE, Codes, Drift
    from onerec.monitor.ledger import LEDGER_FILE, Ledger
    from onerec.monitor.looks import RepositoryLook, RunLook, StateLook
    from onerec.monitor.of_monitor import MonitorMetrics
    from onerec.monitor.opening import open_metrics
    from onerec.monitor.prober import Prober, Replica
    from onerec.monitor.watch import Monitor
    from onerec.signals import stopping

    configuration = load_config(config, settings)
    servers, watch = replicas(server), configuration.monitor
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if new_reference:
            (run_dir / DRIFT_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{run_dir}: {error.strerror}; name a folder that can be written") from None

    def say(text: str) -> None:
        err.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, markup=False, soft_wrap=True)

    drift = Drift(
        run_dir / DRIFT_FILE, reference_sessions=watch.reference_sessions, window_sessions=watch.window_sessions,
        code_of=Codes(state, time.monotonic),
    )  # fmt: skip
    with stopping() as stop, open_metrics("monitor", configuration, metrics_port) as metrics:
        told = MonitorMetrics(metrics, configuration.freshness.objective_s)
        looking = Monitor(
            StateLook(state), RunLook(run_dir), RepositoryLook(repository), servers, mode=configuration.freshness.clock,
            ledger=Ledger(run_dir / LEDGER_FILE), drift=drift, on_answer=told.answered, on_news=told.news, say=say,
        )  # fmt: skip
        where = f"; metrics on http://{metrics.address}/metrics" if metrics.address else ""
        say(f"asking {', '.join(servers)} every {watch.every_s:g} s{where}; Ctrl-C stops")
        try:
            with Prober([Replica(name, looking.users) for name in servers], looking.answered, every_s=watch.every_s):
                while not stop:
                    told.snapshot = looking.step()
                    time.sleep(LOOK_SECONDS)
        finally:
            looking.close()


def register(app: typer.Typer) -> None:
    """Add `monitor`."""
    app.command()(monitor)
