"""Several ranks learn as one process does: what they share out, what they add up, and who decides."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_loop import session

from onerec.errors import UserError
from streaming.sessions import Session
from trainer.checkpoint import Cursor
from trainer.config import ModelConfig
from trainer.data import BatchReader, Example
from trainer.journal import Entry, Journal
from trainer.learner import micro_batches, ntp_parts, owns, share
from trainer.model import Batch, OneRec
from trainer.optim import Optimizer
from trainer.parallel import FollowedJournal, Leader
from trainer.ranks import Ranks, added, plain, tensors

CONFIG = ModelConfig(d_model=32, heads=2, d_ff=48, codes=16, experts=3)


def batch_of(seed, windows=7):
    """Histories and sessions of several lengths, some sessions cut short."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (windows, 1), generator=generator)
    items = torch.randint(1, 6, (windows, 1), generator=generator)
    return Batch(
        torch.randint(0, 16, (windows, 12, 3), generator=generator),
        torch.arange(12) < lengths,
        torch.randint(0, 16, (windows, 5, 3), generator=generator),
        torch.arange(5) < items,
    )


def rows(batch, which):
    return Batch(*(tensor[which] for tensor in batch))


def model_of():
    torch.manual_seed(0)
    return OneRec(CONFIG)


def gradient(parts, model):
    """The sum of all parts' gradients and stats."""
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    seen = []
    for loss, stats in parts(model):
        for into, found in zip(total, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), strict=True):
            if found is not None:
                into += found
        seen.append({**stats, "loss": loss.detach()})
    return total, added(seen)


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3], [4, 5, 6]], [[0], [1, 2], [3, 4, 5, 6]]])
def test_micro_batches_have_the_gradient_and_stats_of_the_whole(groups):
    model, batch = model_of(), batch_of(1)
    whole = gradient(ntp_parts(Ranks(), [batch], CONFIG), model)
    parts = gradient(ntp_parts(Ranks(), [rows(batch, group) for group in groups], CONFIG), model)
    for name, a, b in zip(dict(model.named_parameters()), whole[0], parts[0], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)
    for name in ("loss", "ntp", "level_ntp", "tokens", "balance", "expert_load"):
        torch.testing.assert_close(torch.as_tensor(parts[1][name]), torch.as_tensor(whole[1][name]), rtol=1e-5, atol=1e-6)


def test_the_balance_loss_is_of_the_whole_and_not_the_mean_of_the_parts():
    model, batch = model_of(), batch_of(2)
    halves = [rows(batch, [0, 1, 2]), rows(batch, [3, 4, 5, 6])]
    apart = sum(float(model.loss(half)[1]["balance"]) for half in halves) / 2
    together = float(gradient(ntp_parts(Ranks(), halves, CONFIG), model)[1]["balance"])
    assert together == pytest.approx(float(model.loss(batch)[1]["balance"]), abs=1e-6)
    assert abs(apart - together) > 1e-4


def example(user, history):
    return Example(f"{user}:{history}", 0, torch.arange(history).int().numpy(), torch.arange(2).int().numpy(), True, True)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_out_every_user_once_and_evenly(size):
    examples = [example(f"u{number % 500}", number % 7) for number in range(2000)]
    shares = [share(Ranks(rank, size), examples) for rank in range(size)]
    assert sorted(e.session_id for part in shares for e in part) == sorted(e.session_id for e in examples)
    users = [{e.session_id.partition(":")[0] for e in part} for part in shares]
    assert sum(len(part) for part in users) == 500
    assert all(0.7 * 500 / size < len(part) < 1.3 * 500 / size for part in users)
    assert owns(Ranks(), "anyone:1")


def test_micro_batches_are_whole_and_of_like_lengths():
    examples = [example("u", number * 7 % 23) for number in range(23)]
    groups = micro_batches(examples, 5)
    assert sorted(len(e.history) for group in groups for e in group) == list(range(23))
    assert max(len(group) for group in groups) <= 5
    bounds = [(min(len(e.history) for e in g), max(len(e.history) for e in g)) for g in groups]
    assert all(first[1] <= second[0] for first, second in zip(bounds, bounds[1:], strict=False))
    assert micro_batches(examples, 0) == [examples] and micro_batches([], 5) == []


def test_stats_add_up_by_name_and_survive_being_sent():
    stats = {"ntp": torch.tensor(1.5), "level_ntp": torch.tensor([1.0, 2.0]), "of": {"margin": torch.tensor(0.25)}, "n": 3}
    sent = tensors(json.loads(json.dumps(plain(stats))))
    total = added([sent, {"ntp": 0.5, "n": 1}])
    assert total["ntp"] == 2.0 and total["n"] == 4 and total["level_ntp"].tolist() == [1.0, 2.0]
    assert total["of"] == {"margin": 0.25}


class Log:
    """A session log in memory, as far as it has been written."""

    def __init__(self, sessions: list[Session]) -> None:
        self.written = sessions

    def refresh(self) -> None:
        """Nothing to catch up with."""

    def sessions(self, after=0):
        return iter(list(enumerate(self.written, 1))[after:])

    def watermark(self):
        return None


class Items:
    """A catalogue that a test lets grow."""

    def __init__(self) -> None:
        self.index = {f"i{number}": number for number in range(30)}
        self.item_codes = torch.zeros(48, 2).int().numpy()


def reader(log, journal, items):
    return BatchReader(log, journal, lambda: items, cursor=Cursor(), known=0, m=3, n=16, batch_windows=8,
                       idle_seconds=0.01, gap_ms=1, follow=isinstance(journal, Journal), backlog=20, rounds=2)


def test_who_follows_makes_the_leaders_batches_whenever_he_reads(tmp_path):
    log, items = Log([]), Items()
    journal = Journal(tmp_path / "journal.jsonl")
    leader = reader(log, journal, items)
    batches, entries = [], []
    for until, known in ((3, 30), (24, 48), (60, 48)):
        log.written = [session(number) for number in range(until)]
        items.index = {f"i{number}": number for number in range(known)}
        while leader._scanned < until or len(batches) < 1:  # noqa: SLF001
            batches.append(leader.next(len(batches) + 1))
            entries.append(journal.entry(len(batches)) or Entry(step=len(batches)))
    assert any(entry.end for entry in entries) and {entry.items for entry in entries} >= {30, 48}
    told = FollowedJournal()
    follower = reader(log, told, items)
    for entry, batch in zip(entries, batches, strict=True):
        told.tell(entry)
        again = follower.next(entry.step)
        assert (again.cursor, again.last) == (batch.cursor, batch.last)
        assert [e.session_id for e in again.examples] == [e.session_id for e in batch.examples]
        for one, two in zip(again.examples, batch.examples, strict=True):
            assert one.history.tolist() == two.history.tolist() and one.targets.tolist() == two.targets.tolist()
    assert told.entry(len(entries) + 1) is None and told.covers(10**6)


def test_an_idle_leader_speaks_now_and_then_and_alone_never():
    said, now = [], [0.0]

    class Listening(Ranks):
        def tell(self, value, kind):
            said.append(value)
            return value

    leader = Leader(Listening(0, 2), clock=lambda: now[0])
    for second in range(12):
        now[0] = float(second)
        leader.wait()
    assert len(said) == 2
    alone = Leader(Listening(), clock=lambda: now[0])
    now[0] += 100
    alone.wait()
    alone.end()
    assert len(said) == 2


def test_alone_there_is_no_group():
    ranks = Ranks.from_environment({})
    assert (ranks.rank, ranks.size, ranks.leads) == (0, 1, True) and not torch.distributed.is_initialized()
    with ranks:
        assert ranks.collect({"a": 1}, dict) == [{"a": 1}] and ranks.tell(7, int) == 7
        tensor = torch.arange(3.0)
        assert ranks.sum_(tensor) is tensor and tensor.tolist() == [0, 1, 2]


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--nproc-per-node 1"):
        Ranks.from_environment({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"})


RANK_PROGRAM = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
from test_parallel import CONFIG, batch_of, model_of, rows, learn
from trainer.ranks import Ranks
torch.set_num_threads(1)
with Ranks.from_environment() as ranks:
    found = {}
    for precision in ("fp32", "bf16"):
        for shard in (False, True):
            found[f"{precision} {shard}"] = learn(ranks, precision, shard, micro=shard)
    if ranks.leads:
        print(json.dumps(found))
"""


def learn(ranks, precision, shard, micro=False):
    """Eight steps; rank 1 has nothing of the fourth. Losses, weights and moments as lists, after a restore halfway."""
    model = model_of()
    optimizer = Optimizer(model, learning_rate=1e-3, precision=precision, ranks=ranks, shard=shard, clip_norm=0.5)
    seen = []
    for step in range(8):
        batch = batch_of(step)
        own = [row for row in range(7) if (0 if step == 3 else row) % ranks.size == ranks.rank]
        groups = [group for group in ([own[:2], own[2:]] if micro else [own]) if group]
        seen.append(optimizer.step_parts(ntp_parts(ranks, [rows(batch, group) for group in groups], CONFIG)))
        if step == 4:
            state = optimizer.state_dict()
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = ranks.same(state[name] if ranks.leads else torch.zeros(optimizer_size(model)))
            optimizer = Optimizer(model, learning_rate=1e-3, precision=precision, ranks=ranks, shard=shard, clip_norm=0.5)
            optimizer.load_state_dict(state)
    state = optimizer.state_dict()
    return {
        "loss": [stats["loss"] for stats in seen],
        "norm": [stats["grad_norm"] for stats in seen],
        "tokens": [stats["tokens"] for stats in seen],
        "load": [torch.as_tensor(stats["expert_load"]).tolist() for stats in seen],
        "weights": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist(),
        "moments": state["exp_avg"].tolist(),
    }


def optimizer_size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns():
    """In both precisions, with whole and sliced moments, micro-batches, and a rank that has nothing to learn."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(Path(__file__).parent)],
            env=environment | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    found = json.loads(outputs[0][0])
    for precision, near in (("fp32", 1e-4), ("bf16", 3e-2)):
        one = learn(Ranks(), precision, shard=False)
        for shard in ("False", "True"):
            two = found[f"{precision} {shard}"]
            assert two["tokens"] == one["tokens"]
            assert two["loss"] == pytest.approx(one["loss"], rel=near)
            assert two["norm"] == pytest.approx(one["norm"], rel=10 * near)
            assert sum(map(sum, two["load"][3])) == pytest.approx(CONFIG.decoder_layers)
            # Adam's first steps are of size lr whatever the gradient's: a rounding around 0 may turn a few around.
            away = (torch.tensor(two["weights"]) - torch.tensor(one["weights"])).abs()
            assert away.mean() < 1e-3 * near * 10 and len(two["moments"]) == len(one["moments"])
