"""Eq. 2: the sparse experts against a loop written from the paper, forwards, backwards and in ONNX Runtime."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainer.moe import MoE, Routing, balance_loss, load, of_tokens


def experts_of(experts=5, top_k=2, d=6, f=9, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    moe = MoE(d, f, experts, top_k).to(dtype)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return moe


def equation_2(moe, x):
    """Token by token and expert by expert, without the residual."""
    rows = []
    for token in x:
        s = torch.softmax(moe.router @ token, dim=0)
        top = set(torch.topk(s, moe.top_k).indices.tolist())
        total = torch.zeros_like(token)
        for i in range(len(s)):
            g = s[i] if i in top else 0.0
            total = total + g * (moe.w2[i] @ F.relu(moe.w1[i] @ token))
        rows.append(total)
    return torch.stack(rows)


def tokens(count, d=6, seed=1, dtype=torch.float64):
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_equals_equation_2(top_k, count):
    moe, x = experts_of(top_k=top_k), tokens(count)
    torch.testing.assert_close(moe(x), equation_2(moe, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_equal_those_of_equation_2(top_k):
    moe, x, pull = experts_of(top_k=top_k), tokens(17).requires_grad_(), tokens(17, seed=2)
    inputs = [x, *moe.parameters()]
    fast = torch.autograd.grad((moe(x) * pull).sum(), inputs)
    slow = torch.autograd.grad((equation_2(moe, x) * pull).sum(), inputs)
    for ours, reference in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-12)


def test_expert_without_tokens_gets_a_zero_gradient():
    moe = experts_of(experts=4, top_k=1)
    with torch.no_grad():
        moe.router.zero_()
        moe.router[2] = 100.0
    x = tokens(8).abs()
    moe(x).sum().backward()
    for weight in (moe.w1, moe.w2):
        idle = torch.ones(4, dtype=torch.bool).index_fill(0, torch.tensor(2), False)
        assert torch.equal(weight.grad[idle], torch.zeros_like(weight.grad[idle]))
        assert weight.grad[2].abs().sum() > 0


def test_one_expert_is_a_dense_ffn():
    moe, x = experts_of(experts=1, top_k=1), tokens(7)
    torch.testing.assert_close(moe(x), F.linear(F.relu(F.linear(x, moe.w1[0])), moe.w2[0]))


def test_top_1_is_the_gate_times_the_chosen_ffn():
    moe, x = experts_of(experts=3, top_k=1), tokens(11)
    s = torch.softmax(x @ moe.router.T, dim=-1)
    for token, answer, row in zip(x, moe(x), s, strict=True):
        i = int(row.argmax())
        torch.testing.assert_close(answer, row[i] * (moe.w2[i] @ F.relu(moe.w1[i] @ token)))


def test_gates_are_not_renormalised():
    routing = experts_of().route(tokens(50))
    assert (routing.gates.sum(-1) < 1 - 1e-6).all()
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(50, dtype=torch.float64))


def test_tokens_do_not_touch_each_other():
    moe, x = experts_of(), tokens(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moe(x[order]), moe(x)[order])
    torch.testing.assert_close(moe(x[:3]), moe(x)[:3])


def routing_to(experts, count=4):
    chosen = torch.tensor(experts)
    probabilities = torch.full((len(chosen), count), 0.1 / (count - 1)).scatter(1, chosen, 0.9)
    return Routing(probabilities, probabilities.gather(1, chosen), chosen)


def test_balance_loss_is_1_when_even_and_grows_with_the_load_of_one():
    even = balance_loss(routing_to([[0], [1], [2], [3]]))
    skewed = balance_loss(routing_to([[0], [0], [0], [3]]))
    collapsed = balance_loss(routing_to([[0], [0], [0], [0]]))
    assert even == pytest.approx(1.0)
    assert even < skewed < collapsed
    assert collapsed == pytest.approx(4 * 0.9)


def test_load_counts_real_tokens_only():
    routing = routing_to([[0], [0], [2], [3]])
    assert load(routing).tolist() == pytest.approx([0.5, 0.0, 0.25, 0.25])
    kept = of_tokens(routing, torch.tensor([True, True, False, False]))
    assert load(kept).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])


def test_balance_loss_spreads_a_collapsed_router():
    moe = experts_of(experts=4, top_k=1)
    with torch.no_grad():
        moe.router[1] += 0.5
    x = tokens(64).abs()
    before = load(moe.route(x)).max()
    descent = torch.optim.SGD([moe.router], lr=0.3)
    for _ in range(50):
        descent.zero_grad()
        balance_loss(moe.route(x)).backward()
        descent.step()
    assert load(moe.route(x)).max() < before - 0.2


def test_onnx_runtime_gives_the_same_where_the_input_is_nobody_elses(tmp_path):
    """The kernel may write its output over such an input; that once was silently wrong."""
    onnxruntime = pytest.importorskip("onnxruntime")

    class Between(nn.Module):
        def __init__(self, moe):
            super().__init__()
            self.moe = moe

        def forward(self, x):
            return self.moe(x.exp() - 1) * 2

    model = Between(experts_of(dtype=torch.float32)).eval()
    x = tokens(12, dtype=torch.float32)
    program = torch.onnx.export(
        model, (x,), dynamo=True, optimize=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
    )
    program.save(tmp_path / "moe.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "moe.onnx", providers=["CPUExecutionProvider"])
    assert [node.op_type for node in program.model.graph].count("MoE") == 1
    for count in (1, 12, 40):
        x = tokens(count, dtype=torch.float32, seed=count)
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(answer, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
