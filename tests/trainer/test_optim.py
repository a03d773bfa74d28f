"""The optimiser against torch's own, and what it promises of precision, bytes and broken steps."""

import platform

import pytest
import torch
from safetensors.torch import load_file, save_file

from onerec.errors import UserError
from trainer.config import ModelConfig
from trainer.model import Batch, OneRec
from trainer.optim import Optimizer, resolve_precision, reuse_memory

CONFIG = ModelConfig(d_model=32, heads=2, d_ff=48, codes=16, experts=3)
PRECISIONS = ["fp32", "bf16"]


def model_of(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return OneRec(config)


def batch_of(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (6, 1), generator=generator)
    return Batch(
        torch.randint(0, 16, (6, 12, 3), generator=generator),
        torch.arange(12) < lengths,
        torch.randint(0, 16, (6, 5, 3), generator=generator),
        torch.ones(6, 5, dtype=torch.bool),
    )


def learn(optimizer, seeds):
    return [optimizer.step(lambda model, seed=seed: model.loss(batch_of(seed))) for seed in seeds]


def bytes_of(model):
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def test_fp32_is_torchs_adam_with_clipping():
    ours, reference = model_of(), model_of()
    optimizer = Optimizer(ours, learning_rate=1e-3, clip_norm=0.2, precision="fp32")
    adam = torch.optim.Adam(reference.parameters(), lr=1e-3)
    for seed in range(5):
        (stats,) = learn(optimizer, [seed])
        adam.zero_grad()
        reference.loss(batch_of(seed))[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.2)
        adam.step()
        assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.2
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_steps_give_the_same_bytes(precision):
    models = [model_of(), model_of()]
    for model in models:
        learn(Optimizer(model, precision=precision), range(4))
    assert bytes_of(models[0]) == bytes_of(models[1]) != bytes_of(model_of())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_restored_run_goes_on_with_the_same_bytes(precision, tmp_path):
    whole = model_of()
    learn(Optimizer(whole, precision=precision), range(6))

    first = model_of()
    optimizer = Optimizer(first, precision=precision)
    learn(optimizer, range(3))
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    save_file(optimizer.state_dict(), tmp_path / "optimizer.safetensors")

    second = model_of(seed=9)
    second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    resumed = Optimizer(second, precision=precision)
    resumed.load_state_dict(load_file(tmp_path / "optimizer.safetensors"))
    learn(resumed, range(3, 6))
    assert bytes_of(second) == bytes_of(whole)


def test_masters_keep_updates_too_small_for_bf16():
    model = model_of()
    before = model.level_embedding[0].detach().clone()
    optimizer = Optimizer(model, learning_rate=1e-5, precision="bf16")
    learn(optimizer, [0] * 10)
    moved = (model.level_embedding[0] - before).abs()
    assert model.level_embedding[0].dtype == torch.float32
    assert 1e-5 < moved.max() < 2e-4
    for master, shadow in zip(model.parameters(), optimizer.compute.parameters(), strict=True):
        assert torch.equal(master.to(torch.bfloat16), shadow)


def test_bf16_learns_like_fp32():
    losses = {}
    for precision in PRECISIONS:
        stats = learn(Optimizer(model_of(), learning_rate=1e-3, precision=precision), [0, 1] * 30)
        losses[precision] = sum(float(s["ntp"]) for s in stats[-2:]) / 2
    assert losses["fp32"] < 2.5
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(precision, poison):
    model = model_of()
    optimizer = Optimizer(model, precision=precision)
    learn(optimizer, [0])
    weights, moments = bytes_of(model), optimizer.state_dict()

    def broken(compute):
        loss, stats = compute.loss(batch_of(1))
        return loss * poison, stats

    stats = optimizer.step(broken)
    assert stats["skipped"] and optimizer.skipped == 1
    assert bytes_of(model) == weights
    after = optimizer.state_dict()
    assert all(torch.equal(after[name], moments[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert int(after["skipped"]) == 1
    (next_stats,) = learn(optimizer, [2])
    assert not next_stats["skipped"] and bytes_of(model) != weights


def test_state_of_another_architecture_is_refused():
    other = Optimizer(model_of(config=ModelConfig(d_model=64, codes=16)), precision="fp32")
    with pytest.raises(UserError, match="different architectures"):
        Optimizer(model_of(), precision="fp32").load_state_dict(other.state_dict())


def test_precision_named_is_precision_used():
    assert [resolve_precision(name) for name in PRECISIONS] == PRECISIONS
    assert resolve_precision("auto") in PRECISIONS


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_settings_are_taken():
    assert reuse_memory()
