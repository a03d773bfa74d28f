"""Eq. 3 and 4 and the encoder: what the whole model must satisfy, whatever its weights."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from trainer.attention import score_bias
from trainer.config import ModelConfig
from trainer.model import BALANCE_WEIGHT, Batch, OneRec
from trainer.moe import balance_loss
from trainer.packing import pack


def model_of(seed=0, **changes):
    config = ModelConfig(
        **{
            "d_model": 16,
            "heads": 2,
            "d_ff": 24,
            "codes": 7,
            "experts": 3,
            "relative_buckets": 8,
            "relative_max_distance": 16,
            **changes,
        }
    )
    model = OneRec(config).double().eval()
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        # As after training: heads that decide, and positions that count.
        for head in model.level_head:
            head.mul_(10)
        for stack in (model.encoder_bias, model.decoder_bias):
            stack.table.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def batch_of(lengths=(4, 0, 9, 1), sizes=(5, 5, 2, 3), *, m=5, levels=3, codes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    users, longest = len(lengths), max(1, *lengths)
    return Batch(
        torch.randint(0, codes, (users, longest, levels), generator=generator),
        torch.arange(longest) < torch.tensor(lengths)[:, None],
        torch.randint(0, codes, (users, m, levels), generator=generator),
        torch.arange(m) < torch.tensor(sizes)[:, None],
    )


def hidden_by_full_decode(model, batch):
    """Eq. 3 through the public steps, one block, nothing packed."""
    memory, mask = model.encode(batch.history, batch.history_mask)
    x = model.session_embedded(batch.targets)
    return model.decode(x, torch.arange(x.shape[1]), None, model.cross_kv(memory), mask)[0], memory, mask


@pytest.mark.parametrize("history_tokens", ["item", "code"])
def test_packed_training_form_equals_the_exported_steps(history_tokens):
    model, batch = model_of(history_tokens=history_tokens), batch_of()
    assert pack(batch.history_mask.sum(1).numpy() + 1, 10).owner.shape[0] < len(batch.history)
    hidden, _, _ = hidden_by_full_decode(model, batch)
    logits = model.token_logits(*batch)
    for item, level in itertools.product(range(5), range(3)):
        torch.testing.assert_close(logits[:, item, level], model.head(level, hidden[:, item * 4 + level]))


@pytest.mark.parametrize("history_tokens", ["item", "code"])
def test_a_user_alone_gets_what_he_gets_among_others(history_tokens):
    model, batch = model_of(history_tokens=history_tokens), batch_of()
    together = model.token_logits(*batch)
    for user, length in enumerate(batch.history_mask.sum(1).tolist()):
        rows = [part[user : user + 1] for part in batch]
        alone = model.token_logits(rows[0][:, : max(1, length)], rows[1][:, : max(1, length)], *rows[2:])
        torch.testing.assert_close(alone[0], together[user])


def test_padding_codes_of_the_history_change_nothing():
    model, batch = model_of(), batch_of()
    other = torch.where(batch.history_mask.unsqueeze(-1), batch.history, 6 - batch.history)
    assert not torch.equal(other, batch.history)
    memory, mask = model.encode(batch.history, batch.history_mask)
    again, _ = model.encode(other, batch.history_mask)
    torch.testing.assert_close(again[mask], memory[mask])
    torch.testing.assert_close(model.token_logits(other, *batch[1:]), model.token_logits(*batch))


@pytest.mark.parametrize("place", range(15))
def test_a_target_code_changes_later_logits_only(place):
    model, batch = model_of(), batch_of(sizes=(5, 5, 5, 5))
    changed = batch.targets.flatten(1).clone()
    changed[:, place] = (changed[:, place] + 1) % 7
    before = model.token_logits(*batch).flatten(1, 2)
    after = model.token_logits(*batch[:2], changed.view_as(batch.targets), batch.target_mask).flatten(1, 2)
    torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1])
    if place < 14:
        assert (after[:, place + 1 :] - before[:, place + 1 :]).abs().amax(dim=(1, 2)).min() > 1e-6


def test_every_history_item_and_its_order_count():
    model, batch = model_of(), batch_of(lengths=(6,), sizes=(5,))
    before = model.token_logits(*batch)
    for item in range(6):
        changed = batch.history.clone()
        changed[0, item] = (changed[0, item] + 1) % 7
        assert (model.token_logits(changed, *batch[1:]) - before).abs().max() > 1e-6
    assert (model.token_logits(batch.history.flip(1), *batch[1:]) - before).abs().max() > 1e-6


def test_history_tokens_decide_the_memory_length():
    batch = batch_of()
    for tokens, length in (("item", 1 + 9), ("code", 1 + 9 * 3)):
        memory, mask = model_of(history_tokens=tokens).encode(*batch[:2])
        assert memory.shape[1] == length
        each = 1 if tokens == "item" else 3
        assert mask.sum(1).tolist() == [1 + each * n for n in (4, 0, 9, 1)]


def test_one_level_makes_item_and_code_tokens_the_same():
    batch = batch_of(levels=1)
    item, code = (model_of(levels=1, history_tokens=tokens) for tokens in ("item", "code"))
    torch.testing.assert_close(item.token_logits(*batch), code.token_logits(*batch))


def test_cached_decoding_equals_decoding_at_once():
    model, batch = model_of(), batch_of()
    full, memory, mask = hidden_by_full_decode(model, batch)
    cross = model.cross_kv(memory)
    inputs = model.session_embedded(batch.targets)
    cache, start = None, 0
    # The blocks of the beam search: BOS, s1, s2, then [s3, BOS] together.
    for size in [1, 1, 1] + [2, 1, 1] * 4:
        positions = torch.arange(start, start + size)
        hidden, cache = model.decode(inputs[:, start : start + size], positions, cache, cross, mask)
        torch.testing.assert_close(hidden, full[:, start : start + size])
        start += size
    assert start == inputs.shape[1] and cache[0][0].shape[2] == start


def test_beams_share_the_memory_of_their_user():
    model, batch = model_of(), batch_of()
    memory, mask = model.encode(*batch[:2])
    beams = torch.randn(4 * 3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(2)
    shared, _ = model.decode(beams, positions, None, model.cross_kv(memory), mask)
    copies = memory.repeat_interleave(3, dim=0)
    apart, _ = model.decode(beams, positions, None, model.cross_kv(copies), mask.repeat_interleave(3, dim=0))
    torch.testing.assert_close(shared, apart)


@pytest.mark.parametrize(("m", "levels", "codes"), [(1, 2, 4), (2, 1, 4), (2, 2, 3)])
def test_probabilities_of_all_sessions_sum_to_1(m, levels, codes):
    model = model_of(levels=levels, codes=codes, session_items=m)
    every = torch.tensor(list(itertools.product(range(codes), repeat=m * levels))).view(-1, m, levels)
    history = batch_of((3,), (m,), m=m, levels=levels, codes=codes)
    log_p = model.session_log_prob(
        history.history.expand(len(every), -1, -1),
        history.history_mask.expand(len(every), -1),
        every,
        torch.ones(len(every), m, dtype=torch.bool),
    )
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert log_p.std() > 0.1


def test_session_log_prob_counts_real_items_only():
    model, batch = model_of(), batch_of()
    logits = model.token_logits(*batch)
    for user, size in enumerate(batch.target_mask.sum(1).tolist()):
        total = sum(torch.log_softmax(logits[user, i, j], -1)[batch.targets[user, i, j]] for i in range(size) for j in range(3))
        torch.testing.assert_close(model.session_log_prob(*batch)[user], total)


def test_loss_is_equation_4_over_the_real_codes():
    model, batch = model_of(), batch_of()
    logits = model.token_logits(*batch)[batch.target_mask]
    wanted = F.cross_entropy(logits.flatten(0, 1), batch.targets[batch.target_mask].flatten())
    loss, stats = model.loss(batch)
    assert stats["tokens"] == 3 * (5 + 5 + 2 + 3)
    torch.testing.assert_close(stats["ntp"].double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats["level_ntp"].mean(), stats["ntp"])
    torch.testing.assert_close(loss.double(), wanted + BALANCE_WEIGHT * stats["balance"].double(), rtol=1e-6, atol=1e-6)


def test_padded_targets_change_neither_loss_nor_load_nor_gradient():
    model, batch = model_of(), batch_of()
    other = torch.where(batch.target_mask.unsqueeze(-1), batch.targets, 6 - batch.targets)
    assert not torch.equal(other, batch.targets)
    (one, stats), (two, again) = model.loss(batch), model.loss(batch._replace(targets=other))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(stats["expert_load"], again["expert_load"])
    for a, b in zip(
        torch.autograd.grad(one, list(model.parameters())),
        torch.autograd.grad(two, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_expert_load_is_the_share_of_each_layer():
    model, batch = model_of(), batch_of(sizes=(5, 5, 5, 5))
    _, stats = model.loss(batch)
    assert stats["expert_load"].shape == (2, 3)
    torch.testing.assert_close(stats["expert_load"].sum(1), torch.ones(2))
    routings = []
    memory, mask = model.encode(*batch[:2])
    x = model.session_embedded(batch.targets)
    model.decode(x, torch.arange(x.shape[1]), None, model.cross_kv(memory), mask, routings)
    wanted = torch.stack([balance_loss(routing) for routing in routings]).mean()
    torch.testing.assert_close(stats["balance"], wanted.detach())


def test_decoder_reads_bos_before_the_codes_of_each_item():
    model, batch = model_of(), batch_of()
    inputs = model.session_embedded(batch.targets)
    assert inputs.shape == (4, 5 * 4 - 1, 16)
    for item in range(5):
        assert torch.equal(inputs[:, item * 4], model.embed_bos().expand(4, -1))
        for level in range(3 if item < 4 else 2):
            wanted = model.embed_code(level, batch.targets[:, item, level])
            assert torch.equal(inputs[:, item * 4 + 1 + level], wanted)


def test_experts_are_added_to_what_they_read():
    model, batch = model_of(), batch_of()
    layer = model.decoder[0]
    with torch.no_grad():
        layer.attention.out.weight.zero_()
        layer.cross_attention.out.weight.zero_()
    memory, mask = model.encode(*batch[:2])
    x = model.session_embedded(batch.targets)
    causal = score_bias(None, torch.ones(19, 19, dtype=torch.bool).tril(), x.dtype)
    cross = score_bias(None, mask[:, None, None, :], x.dtype)
    answer, _ = layer(x, causal, None, model.cross_kv(memory)[0], cross)
    torch.testing.assert_close(answer, x + layer.moe(layer.ffn_norm(x)))
    assert (answer - x).abs().max() > 0.1


@pytest.mark.parametrize("codes", [16, 256, 4096])
def test_first_loss_of_each_level_is_log_k(codes):
    torch.manual_seed(0)
    model = OneRec(ModelConfig(codes=codes))
    _, stats = model.loss(batch_of(lengths=(20,) * 32, sizes=(5,) * 32, codes=codes))
    assert stats["level_ntp"].tolist() == pytest.approx([math.log(codes)] * 3, abs=0.05)


@pytest.mark.parametrize("history_tokens", ["item", "code"])
def test_every_parameter_learns(history_tokens):
    model = model_of(history_tokens=history_tokens)
    loss, _ = model.loss(batch_of(lengths=(9, 7, 8, 30)))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient.abs().max() > 0, name


def test_a_rule_of_the_history_is_learnt():
    """The next items repeat the newest ones: only a model that knows which items are newest gets it right."""
    torch.manual_seed(0)
    model = OneRec(ModelConfig(d_model=32, heads=2, d_ff=64, codes=8, levels=2, session_items=1, experts=2))
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        batch = batch_of((1, 2, 4, 7) * 8, (1,) * 32, m=1, levels=2, codes=8, seed=step)
        newest = batch.history[torch.arange(32), batch.history_mask.sum(1) - 1].unsqueeze(1)
        loss, stats = model.loss(batch._replace(targets=newest))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert stats["ntp"] < 0.3 * math.log(8)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="d_model 16 is not a multiple of heads 3"):
        OneRec(ModelConfig(d_model=16, heads=3))


def test_buckets_beyond_the_largest_distance_are_refused():
    with pytest.raises(ValueError, match="relative_max_distance 16"):
        OneRec(ModelConfig(relative_buckets=32, relative_max_distance=16))
