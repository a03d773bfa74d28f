"""The reward model against eq. 5-7 written out, what must not change its rewards, and what its optimiser promises."""

import math

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from onerec.errors import UserError
from trainer.config import RewardConfig, RewardModelConfig
from trainer.reward import (
    ITEM_LOSS,
    TARGETS,
    RewardBatch,
    RewardModel,
    RewardOptimizer,
    SessionAttention,
    combine,
    prefix_rows,
)
from trainer.reward_weights import combine_array

CONFIG = RewardModelConfig(dimension=16, heads=2, hidden=8, buckets=64, history_length=8, codes=16)


def model_of(seed=0, config=CONFIG, noise=0.3):
    """A model whose every weight matters, also those that begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    model = RewardModel(config)
    model.reset_parameters(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch_of(seed, sessions=6, windows=3, history=8, items=True):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, history + 1, (sessions, 1), generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (sessions, windows, 1), generator=generator)
    mask[0, -1] = False
    return RewardBatch(
        torch.randint(0, 16, (sessions, history, 3), generator=generator),
        torch.arange(history) < lengths,
        torch.randint(0, 16, (sessions, windows, 5, 3), generator=generator),
        mask,
        torch.rand(sessions, windows, 4, generator=generator),
        torch.rand(sessions, windows, 5, 4, generator=generator) if items else None,
    )


def logits_of(model, batch):
    with torch.no_grad():
        return model(*batch[:4])


def real_windows(batch):
    return batch.session_mask.any(-1)


def same(first, second):
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_session_attention_is_equation_5_head_by_head():
    torch.manual_seed(0)
    layer = SessionAttention(CONFIG)
    h = torch.randn(5, 8)
    query, key, value = (h @ weight.T for weight in layer.query_key_value.weight.chunk(3))
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        attention = torch.stack([
            torch.exp(key[:, part] @ query[i, part] / math.sqrt(4)) for i in range(5)
        ])
        heads.append(attention / attention.sum(1, keepdim=True) @ value[:, part])
    expected = h + torch.cat(heads, 1) @ layer.out.weight.T
    same(layer(h[None], torch.ones(1, 5, dtype=torch.bool))[0], expected)


def test_the_target_aware_item_is_the_mean_similarity_of_what_each_head_attends_to():
    model, batch = model_of(), batch_of(1)
    attention = model.target_attention
    user = int(batch.history_mask.sum(1).argmax())
    known = int(batch.history_mask[user].sum())
    assert known > 2
    past, item = model.content(batch.history[user, :known]), model.content(batch.sessions[user, 0, 0])
    similarities, nothing = [], []
    for head, part in enumerate((slice(0, 8), slice(8, 16))):
        query = attention.query.weight[part] @ item
        scores = [attention.no_history[head].item()]
        for place in range(known):
            age = known - 1 - place
            scores.append((query @ (attention.key.weight[part] @ past[place]) + attention.recency[age, head]).item())
        weights = np.exp(scores) / np.exp(scores).sum()
        nothing.append(weights[0])
        similarities.append(4.0 * sum(w * (item @ one).item() for w, one in zip(weights[1:], past, strict=True)))
    seen = torch.tensor([*similarities, *nothing], dtype=torch.float32)
    features = torch.cat((model.side(batch.sessions[user, 0, 0]), attention.own(item), seen))
    aware, _ = model._aware(model.content(batch.history), batch.history_mask, batch.sessions)
    same(aware[user, 0, 0], attention.mix(features))


def test_towers_read_the_sum_over_the_items():
    """Eq. 6, without what passes between items: a window's sum is that of windows of one item each."""
    model = model_of(config=msgspec.structs.replace(CONFIG, layers=1))
    with torch.no_grad():
        model.earlier.weight.zero_()
        model.session[0].out.weight.zero_()
        model.position.zero_()
    batch = batch_of(2)
    aware, items = model._aware(model.content(batch.history), batch.history_mask, batch.sessions)
    total = (F.gelu(aware) * batch.session_mask[..., None]).sum(2) / math.sqrt(5)
    for place in range(len(TARGETS)):
        same(model._towers(aware, items, batch.session_mask)[..., place], model.towers[place](total)[..., 0])
    same(model.rewards(*batch[:4]), 1 / (1 + torch.exp(-model(*batch[:4]))))


def test_loss_is_equation_7_over_the_real_windows():
    model, batch = model_of(), batch_of(3)
    loss, stats = model.loss(batch)
    logits, y = model(*batch[:4])[real_windows(batch)].double(), batch.labels[real_windows(batch)]
    r = torch.sigmoid(logits)
    each = -(y * torch.log(r) + (1 - y) * torch.log(1 - r))
    same(loss.double(), each.sum() / len(y))
    same(stats["bce"].double(), each.mean(0))
    same(stats["predictions"].double(), r)
    assert torch.equal(stats["labels"], y)
    assert not any(value.requires_grad for value in stats.values())


def test_in_training_the_items_own_labels_are_learnt_beside():
    model, batch = model_of().train(), batch_of(3)
    aware, _ = model._aware(model.content(batch.history), batch.history_mask, batch.sessions)
    r = torch.sigmoid(model.item_towers(F.gelu(aware[batch.session_mask])).double())
    y = batch.item_labels[batch.session_mask]
    each = -(y * torch.log(r) + (1 - y) * torch.log(1 - r))
    windows = model.loss(batch._replace(item_labels=None))[0]
    same(model.loss(batch)[0].double(), windows + ITEM_LOSS * each.sum() / len(y))
    assert torch.equal(model.eval().loss(batch)[0], windows)


def test_padding_decides_nothing():
    model, batch = model_of(), batch_of(4)
    expected, real = logits_of(model, batch), real_windows(batch)
    noise = torch.randint(0, 16, batch.history.shape)
    other = batch._replace(
        history=torch.where(batch.history_mask[..., None], batch.history, noise),
        sessions=torch.where(batch.session_mask[..., None], batch.sessions, torch.randint(0, 16, batch.sessions.shape)),
    )
    assert torch.equal(logits_of(model, other)[real], expected[real])
    longer = batch._replace(
        history=F.pad(batch.history, (0, 0, 0, 5)),
        history_mask=F.pad(batch.history_mask, (0, 5)),
        sessions=F.pad(batch.sessions, (0, 0, 0, 0, 0, 2)),
        session_mask=F.pad(batch.session_mask, (0, 0, 0, 2)),
        labels=F.pad(batch.labels, (0, 0, 0, 2)),
    )
    same(logits_of(model, longer)[:, :3][real], expected[real])
    assert logits_of(model, longer).isfinite().all()
    same(model.loss(longer)[0], model.loss(batch)[0])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fewer_columns_are_as_if_padded(count):
    model, batch = model_of(), batch_of(4)
    mask = batch.session_mask & (torch.arange(5) < count)
    fewer = batch._replace(sessions=batch.sessions[:, :, :count], session_mask=mask[:, :, :count])
    real = mask.any(-1)
    same(logits_of(model, fewer)[real], logits_of(model, batch._replace(session_mask=mask))[real])


def test_windows_and_users_are_judged_each_for_itself():
    model, batch = model_of(), batch_of(5)
    expected = logits_of(model, batch)
    turned = batch._replace(sessions=batch.sessions.flip(1), session_mask=batch.session_mask.flip(1))
    same(logits_of(model, turned).flip(1), expected)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    same(logits_of(model, RewardBatch(*(part[order] for part in batch))), expected[order])


def test_the_order_of_items_and_the_age_of_history_matter():
    model, batch = model_of(), batch_of(6)
    batch = batch._replace(history_mask=torch.ones_like(batch.history_mask), session_mask=torch.ones_like(batch.session_mask))
    expected = logits_of(model, batch)
    assert (logits_of(model, batch._replace(sessions=batch.sessions.flip(2))) - expected).abs().max() > 1e-3
    assert (logits_of(model, batch._replace(history=batch.history.flip(1))) - expected).abs().max() > 1e-3


def test_an_empty_history_works_at_any_width():
    model, batch = model_of(), batch_of(7)
    empty = batch._replace(history_mask=torch.zeros_like(batch.history_mask))
    expected = logits_of(model, empty)
    none = batch._replace(history=batch.history[:, :0], history_mask=batch.history_mask[:, :0])
    assert expected.isfinite().all()
    same(logits_of(model, none), expected)


def test_only_real_windows_give_gradients():
    model, batch = model_of().train(), batch_of(8)
    real, mask = real_windows(batch), batch.session_mask

    def gradient_of(one):
        model.zero_grad()
        model.loss(one)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradient_of(batch)
    padded = batch._replace(
        labels=torch.where(real[..., None], batch.labels, torch.nan),
        item_labels=torch.where(mask[..., None], batch.item_labels, torch.nan),
        sessions=torch.where(mask[..., None], batch.sessions, torch.randint(0, 16, batch.sessions.shape)),
    )
    same(gradient_of(padded), expected)
    assert not gradient_of(batch._replace(session_mask=torch.zeros_like(mask))).any()


def test_items_of_other_codes_share_a_row_of_one_table_only():
    codes = torch.cartesian_prod(*[torch.arange(32)] * 3)
    first, second = prefix_rows(codes.unbind(-1), 4096)
    assert len(torch.stack((first, second), 1).unique(dim=0)) > 0.99 * len(codes)
    assert torch.bincount(first, minlength=4096).max() < 40  # 8 on average


@pytest.mark.parametrize("width", [5, 16, 40])
def test_content_starts_as_near_as_the_centroids_are(width):
    rng = np.random.default_rng(0)
    centroids = (rng.normal(size=(3, 16, 4)) @ rng.normal(size=(4, width))).astype(np.float32)
    model = RewardModel(CONFIG)
    model.start_from(centroids)
    codes = torch.randint(0, 16, (40, 3), generator=torch.Generator().manual_seed(0))
    vectors = centroids[0][codes[:, 0]] + centroids[1][codes[:, 1]] + centroids[2][codes[:, 2]]
    scale = (centroids[0] ** 2).sum(1).mean()
    with torch.no_grad():
        content = model.content(codes).numpy()
    np.testing.assert_allclose(content @ content.T, vectors @ vectors.T / scale, rtol=1e-3, atol=1e-3)


def test_centroids_of_another_codebook_are_refused():
    with pytest.raises(ValueError, match="3 levels of 16"):
        RewardModel(CONFIG).start_from(np.zeros((3, 8, 16), np.float32))


def test_a_rare_target_starts_at_its_base_rate_and_only_once():
    batch = batch_of(9, sessions=60)
    labels = batch.labels.clone()
    labels[..., 2] = 0
    labels[3, 1, 2] = 1
    batch = batch._replace(labels=labels)
    optimizer = RewardOptimizer(RewardModel(CONFIG), 1e-4)
    first = optimizer.step(batch)
    rates = first["labels"].mean(0)
    assert rates[2] < 0.01
    assert (first["predictions"].mean(0) - rates).abs().max() < 0.02
    optimizer.step(batch._replace(labels=1 - labels))
    assert (optimizer.model.rewards(*batch[:4]).mean((0, 1))[2]) < 0.1


def bytes_of(model):
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def test_the_same_steps_give_the_same_bytes_and_a_restored_copy_goes_on_with_them():
    def begin():
        model = RewardModel(CONFIG)
        model.reset_parameters(torch.Generator().manual_seed(1))
        return RewardOptimizer(model, 1e-2)

    through = begin()
    for seed in range(6):
        through.step(batch_of(seed))
    stopped = begin()
    for seed in range(3):
        stopped.step(batch_of(seed))
    weights = {name: value.clone() for name, value in stopped.model.state_dict().items()}
    moments = {name: value.clone() for name, value in stopped.state_dict().items()}
    resumed = begin()
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(moments)
    for seed in range(3, 6):
        resumed.step(batch_of(seed))
    assert bytes_of(resumed.model) == bytes_of(through.model)
    assert {k: v.numpy().tobytes() for k, v in resumed.state_dict().items()} == {
        k: v.numpy().tobytes() for k, v in through.state_dict().items()
    }


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    optimizer = RewardOptimizer(RewardModel(CONFIG), 1e-2)
    broken = batch_of(0)
    broken.labels[1, 0, 1] = torch.nan
    before = bytes_of(optimizer.model)
    assert optimizer.step(broken)["skipped"]
    assert bytes_of(optimizer.model) == before
    optimizer.step(batch_of(0))
    before = bytes_of(optimizer.model)
    assert optimizer.step(broken)["skipped"] and bytes_of(optimizer.model) == before
    assert int(optimizer.state_dict()["skipped"]) == 2


def test_a_state_of_another_architecture_is_refused():
    other = RewardOptimizer(RewardModel(msgspec.structs.replace(CONFIG, hidden=16)))
    with pytest.raises(UserError, match="different architectures"):
        RewardOptimizer(RewardModel(CONFIG)).load_state_dict(other.state_dict())


def test_steps_lower_the_loss_of_a_batch():
    optimizer = RewardOptimizer(RewardModel(CONFIG), 1e-2)
    losses = [optimizer.step(batch_of(0, items=False))["loss"] for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1


def test_one_reward_is_the_weighted_mean_in_torch_and_numpy_alike():
    rewards = torch.rand(3, 7, 4)
    config = RewardConfig(swt=2, vtr=1, wtr=0, ltr=1)
    expected = (2 * rewards[..., 0] + rewards[..., 1] + rewards[..., 3]) / 4
    same(combine(rewards, config), expected)
    np.testing.assert_allclose(combine_array(rewards.numpy(), config), expected.numpy(), rtol=1e-6)
    assert combine_array(rewards.numpy(), config).dtype == np.float32


def test_four_weights_of_zero_are_refused_with_the_remedy():
    nothing = RewardConfig(swt=0, vtr=0, wtr=0, ltr=0)
    for combined in (lambda: combine(torch.rand(2, 4), nothing), lambda: combine_array(np.ones((2, 4)), nothing)):
        with pytest.raises(UserError, match="at least one tower"):
            combined()
