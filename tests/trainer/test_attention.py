"""Attention, position bias, norm and packing against what they must equal."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.attention import PositionBias, attend, relative_bucket, score_bias
from trainer.config import ModelConfig
from trainer.norm import EPSILON, RMSNorm
from trainer.packing import pack


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def plain_attention(q, k, v, learnt, mask):
    scores = torch.einsum("rhqd,rhsd->rhqs", q, k) / q.shape[-1] ** 0.5
    if learnt is not None:
        scores = scores + learnt
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v


@pytest.mark.parametrize("biased", [True, False])
def test_attention_and_its_gradients_equal_the_definition(biased):
    q, k, v = random(3, 2, 4, 5), random(3, 2, 7, 5, seed=1), random(3, 2, 7, 5, seed=2)
    learnt = random(2, 4, 7, seed=3) if biased else None
    mask = torch.arange(7)[None, None, None, :] < torch.tensor([7, 1, 4])[:, None, None, None]
    inputs = [q, k, v, learnt] if biased else [q, k, v]
    ours = attend(q, k, v, score_bias(learnt, mask, torch.float64))
    reference = plain_attention(q, k, v, learnt, mask)
    torch.testing.assert_close(ours, reference)
    pull = random(3, 2, 4, 5, seed=4).detach()
    for got, wanted in zip(
        torch.autograd.grad((ours * pull).sum(), inputs),
        torch.autograd.grad((reference * pull).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_forbidden_keys_weigh_nothing_even_in_half_precision():
    q, k, v = (random(1, 1, 3, 4, seed=seed).detach().to(torch.bfloat16) for seed in range(3))
    mask = torch.tensor([True, False, True])[None, None, None, :]
    changed = v.clone()
    changed[0, 0, 1] = 1e4
    bias = score_bias(None, mask, torch.bfloat16)
    assert torch.equal(attend(q, k, v, bias), attend(q, k, changed, bias))


def test_norm_and_its_gradients_equal_the_definition():
    x, norm = random(4, 3, 6), RMSNorm(6).double()
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    pull = random(4, 3, 6, seed=2).detach()
    reference = x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPSILON) * norm.weight
    torch.testing.assert_close(norm(x), reference)
    inputs = [x, norm.weight]
    for got, wanted in zip(
        torch.autograd.grad((norm(x) * pull).sum(), inputs),
        torch.autograd.grad((reference * pull).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_t5(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = torch.arange(-400, 401)
    wanted = t5.T5Attention._relative_position_bucket(distances, bidirectional, 32, 128).tolist()
    ours = [
        relative_bucket(distance, bidirectional=bidirectional, buckets=32, max_distance=128) for distance in distances.tolist()
    ]
    assert ours == wanted


def test_bias_depends_on_the_distance_only():
    bias = PositionBias(ModelConfig(heads=2), bidirectional=True)
    torch.nn.init.normal_(bias.table)
    near, far = bias(torch.arange(5), torch.arange(5)), bias(torch.arange(100, 105), torch.arange(100, 105))
    assert torch.equal(near, far)
    assert not torch.equal(near[:, 0, 1], near[:, 1, 0])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=50), st.integers(0, 30))
def test_packing_keeps_every_sequence_whole_and_apart(lengths, slack):
    lengths = np.array(lengths)
    packing = pack(lengths, int(lengths.max()) + slack)
    width, flat_owner, flat_source = packing.owner.shape[1], packing.owner.ravel(), packing.source.ravel()
    starts = np.cumsum(lengths) - lengths
    for sequence, length in enumerate(lengths):
        place = packing.place[sequence, :length]
        assert (np.diff(place) == 1).all() and place[0] // width == place[-1] // width
        assert (flat_owner[place] == sequence).all()
        assert (flat_source[place] == starts[sequence] + np.arange(length)).all()
    assert (flat_owner >= 0).sum() == lengths.sum()


@given(st.lists(st.integers(1, 40), min_size=2, max_size=50))
def test_packed_rows_are_at_least_half_full_on_average(lengths):
    lengths = np.array(lengths)
    rows, width = pack(lengths, 40).owner.shape
    assert rows == 1 or lengths.sum() > rows * width / 2
