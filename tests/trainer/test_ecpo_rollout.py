"""Sessions drawn from the policy: the right distribution, the right log-probabilities, legal where a trie says so."""

import itertools

import numpy as np
import pytest
import torch

from exporter.trie import build_trie
from trainer.beam import trie_tensors
from trainer.config import ModelConfig
from trainer.model import OneRec
from trainer.policy_rewards import legality
from trainer.rollout import sample_sessions

CODES = 5


def policy(levels=2, items=2, seed=0):
    """A tiny model with sharp predictions: heads as they are drawn would make all codes nearly equal."""
    model = OneRec(
        ModelConfig(
            d_model=16, heads=2, d_ff=24, experts=2, encoder_layers=1, decoder_layers=1,
            levels=levels, codes=CODES, session_items=items,
        )
    )  # fmt: skip
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for head in model.level_head:
            head.mul_(10)
    return model


def histories(levels=2, users=2):
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(4) < torch.tensor([4, 0, 2])[:users, None]
    return torch.randint(0, CODES, (users, 4, levels), generator=generator), mask


def draw(model, count, seed=0, trie=None, users=2):
    history, mask = histories(model.config.levels, users)
    return sample_sessions(
        model, history, mask, count=count, generator=torch.Generator().manual_seed(seed),
        trie=None if trie is None else trie_tensors(trie),
    )  # fmt: skip


def log_probs(model, codes, users=2):
    history, mask = histories(model.config.levels, users)
    return model.code_log_probs(history, mask, codes).sum((-1, -2))


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("levels", "items"), [(1, 3), (2, 2), (3, 2)])
def test_the_log_probabilities_are_the_models_own(levels, items, constrained):
    model = policy(levels, items)
    every = np.array(list(itertools.product(range(CODES), repeat=levels)))
    trie = build_trie(every[::2], CODES) if constrained else None
    samples = draw(model, 6, trie=trie, users=3)
    assert samples.codes.shape == (3, 6, items, levels)
    torch.testing.assert_close(samples.log_probs, log_probs(model, samples.codes, users=3), atol=1e-4, rtol=1e-4)


def test_same_generator_same_sessions_and_none_touches_the_global_one():
    model, state = policy(), torch.get_rng_state()
    one, same, other = draw(model, 8, 0), draw(model, 8, 0), draw(model, 8, 1)
    assert torch.equal(one.codes, same.codes) and not torch.equal(one.codes, other.codes)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("items_given", [None, [[0, 1], [0, 3], [2, 2], [4, 0]]])
def test_sessions_come_as_often_as_the_policy_says(items_given):
    """Frequencies of all two-item sessions against exact probabilities, those of a trie against the conditional ones."""
    model, count = policy(), 20_000
    trie = None if items_given is None else build_trie(np.array(items_given), CODES)
    samples = draw(model, count, trie=trie, users=1)
    number = sum(samples.codes.flatten(2)[0, :, place] * CODES**place for place in range(4))
    seen = torch.bincount(number, minlength=CODES**4) / count
    every = torch.tensor([[n // CODES**place % CODES for place in range(4)] for n in range(CODES**4)]).view(1, -1, 2, 2)
    history, mask = histories(users=1)
    with torch.no_grad():
        each = model.code_log_probs(history, mask, every)[0].exp()
    chance = each.prod(-1).prod(-1) if trie is None else _constrained(trie, every[0], each)
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-4)
    assert float((seen - chance).abs().sum()) < 0.12


def _constrained(trie, sessions, each):
    """Chance of each session [S, 2, 2] when each code is drawn from what still leads to an item not used yet."""
    items = [tuple(item) for item in trie.tuples.tolist()]
    keys = [tuple(itertools.chain(*session)) for session in sessions.tolist()]
    place = {key: number for number, key in enumerate(keys)}
    chance = torch.zeros(len(keys))
    for first, second in itertools.permutations(items, 2):
        at, total, used = place[first + second], 1.0, ()
        for step, item in enumerate((first, second)):
            left = [other for other in items if other not in used]
            for level in range(2):
                open_codes = {other[level] for other in left if other[:level] == item[:level]}
                chances = {
                    code: float(each[_like(place, first, second, step, level, code), step, level]) for code in open_codes
                }
                total *= chances[item[level]] / sum(chances.values())
            used = (*used, item)
        chance[at] = total
    return chance


def _like(place, first, second, step, level, code):
    """The number of a session that agrees up to `level` of item `step` and then has `code`."""
    flat = list(first + second)
    flat[2 * step + level] = code
    return place[tuple(flat)]


def test_a_trie_lets_only_items_through_and_none_twice():
    tuples = np.array([[0, 1], [0, 1], [3, 2], [4, 4]])
    trie = build_trie(tuples, CODES)
    samples = draw(policy(items=4), 50, trie=trie, users=3)
    found = legality(trie, samples.codes.numpy())
    assert found.sessions.all()
    rows = np.stack([trie.session_rows(leaves) for leaves in found.leaves.reshape(-1, 4)])
    assert (np.sort(rows, axis=1) == np.arange(4)).all()


def test_entropy_is_the_policys_at_each_level():
    model = policy(items=1)
    with torch.no_grad():
        model.level_head[1].zero_()
    history, mask = histories()
    target = torch.zeros(2, 1, 2, dtype=torch.int64)
    logits = model.token_logits(history, mask, target, torch.ones(2, 1, dtype=torch.bool)).detach()
    first = torch.log_softmax(logits[:, 0, 0], -1)
    entropy = draw(model, 4).entropy
    assert float(entropy[0]) == pytest.approx(float(-(first.exp() * first).sum(-1).mean()), abs=1e-4)
    assert float(entropy[1]) == pytest.approx(np.log(CODES), abs=1e-5)
