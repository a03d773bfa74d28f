"""`onerec train` in several ranks: the run of one process, killed and resumed, with as many ranks as one likes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from test_loop import PROGRAM, SETTINGS, fingerprint, records, session, settings, write

from trainer import presets
from trainer.checkpoint import checkpoint_steps, latest_checkpoint, load_weights
from trainer.evaluate import means, read_metrics
from trainer.loop import train

pytestmark = pytest.mark.slow

PROGRAM = """
import os
from pathlib import Path
Path(os.environ["PIDS"], os.environ["RANK"]).write_text(str(os.getpid()))
""" + PROGRAM
SLICED = ["train.shard_optimizer=true"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state")
    write(path, [session(i, good=i % 5 > 0) for i in range(200)], records())
    return path


@pytest.fixture(scope="module", autouse=True)
def _small_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        small = msgspec.structs.replace(presets.PRESETS["tiny"], d_model=32, heads=2, d_ff=32, encoder_layers=1,
                                        decoder_layers=1, experts=2)
        patch.setitem(presets.PRESETS, "tiny", small)
        yield


@pytest.fixture(scope="module")
def alone(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone")
    train(state, run, settings())
    return run


@pytest.fixture(scope="module")
def together(state: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks."""
    run = tmp_path_factory.mktemp("together")
    together_from(state, run, 2)
    return run


def arguments(state: Path, run: Path, *more: str) -> list[str]:
    options = [part for setting in (*SETTINGS, *SLICED, *more) for part in ("--set", setting)]
    return ["train", "--state", str(state), "--run", str(run), "--json", *options]


def environment(run: Path) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return os.environ | {
        "PIDS": str(run.parent), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)
    }


def together_from(state: Path, run: Path, size: int) -> None:
    """Learn the rest of a run with `size` ranks, started as torchrun starts them; all must end well."""
    base = environment(run)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments(state, run)],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, outputs
    assert outputs[0][0] and not any(output for output, _ in outputs[1:]), "rank 0 alone reports"


def same_run(run: Path, reference: Path) -> None:
    """The same steps, up to rounding in what was computed."""
    lines, expected = read_metrics(run / "metrics.jsonl"), read_metrics(reference / "metrics.jsonl")
    decided = [(line.step, line.sequence, line.windows, line.codes, line.scored) for line in lines]
    assert decided == [(line.step, line.sequence, line.windows, line.codes, line.scored) for line in expected]
    assert [line.loss for line in lines] == pytest.approx([line.loss for line in expected], rel=1e-3)
    assert means(lines)[1]["onerec"]["hit@10"] == pytest.approx(means(expected)[1]["onerec"]["hit@10"], abs=0.05)
    ours, theirs = (load_weights(latest_checkpoint(folder)) for folder in (run, reference))
    away = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in theirs])
    assert away.mean() < 1e-4
    ours, theirs = (latest_checkpoint(folder).counters for folder in (run, reference))
    assert {**ours, "cpu_ms": 0} == {**theirs, "cpu_ms": 0}


def test_two_ranks_make_the_run_of_one(alone: Path, together: Path) -> None:
    same_run(together, alone)


def test_a_killed_rank_ends_all_and_the_run_goes_on_with_any_number(
    state: Path, alone: Path, together: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    base = environment(run)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launched = subprocess.Popen(
        [*torchrun, base["MASTER_PORT"], "--", str(program), *arguments(state, run)],
        env=base, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    try:
        while launched.poll() is None and not checkpoint_steps(run):
            time.sleep(0.01)
        os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
        _, error = launched.communicate(timeout=120)
    finally:
        launched.kill()
    assert launched.returncode != 0 and b"exitcode  : -9" in error, error.decode()
    step = checkpoint_steps(run)[-1]
    assert step < latest_checkpoint(alone).step
    for size in (1, 3):
        copy = tmp_path / f"run{size}"
        shutil.copytree(run, copy)
        if size == 1:
            train(state, copy, settings(*SLICED))
        else:
            together_from(state, copy, size)
        same_run(copy, alone)
    together_from(state, run, 2)
    assert fingerprint(run) == fingerprint(together)
