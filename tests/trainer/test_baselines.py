"""Popularity and co-visitation by hand; what every item transformer must do."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onerec.errors import UserError
from trainer.baselines import CoVisitation, CoVisitationRanker, PopularityRanker, fitting
from trainer.baselines.bert4rec import BERT4Rec, masks
from trainer.baselines.fdsa import FDSA
from trainer.baselines.fitting import (
    PADDING,
    Epoch,
    Held,
    RankerConfig,
    Stopping,
    TransformerRanker,
    causal_rows,
    few,
    ndcg10,
    ranks,
    split,
    validate,
)
from trainer.baselines.sasrec import SASRec
from trainer.rankings import best_rows

ITEMS = 12
FEATURES = np.stack([np.arange(ITEMS) % 3, np.where(np.arange(ITEMS) % 2, np.arange(ITEMS) // 4, -1)], axis=1)
SMALL = RankerConfig(width=16, heads=2, layers=1, length=6, batch=16, learning_rate=1e-2, dropout=0.0, epochs=2)
Make = Callable[[RankerConfig], TransformerRanker]
MAKERS: dict[str, Make] = {
    "sasrec-ce": lambda config: SASRec(ITEMS, config, device="cpu"),
    "sasrec-bce": lambda config: SASRec(ITEMS, config, loss="bce", negatives=3, device="cpu"),
    "bert4rec": lambda config: BERT4Rec(ITEMS, config, device="cpu"),
    "fdsa": lambda config: FDSA(FEATURES, config, device="cpu"),
}
transformers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
lists = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=20), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def chain(users: int = 60, seed: int = 0) -> tuple[np.ndarray, list[list[int]]]:
    """A random cycle through all items, and users who walk along it from anywhere."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(ITEMS)
    follower = np.empty(ITEMS, np.int64)
    follower[order] = np.roll(order, -1)
    found = []
    for _ in range(users):
        walk = [int(rng.integers(ITEMS))]
        for _ in range(rng.integers(3, 9)):
            walk.append(int(follower[walk[-1]]))
        found.append(walk)
    return follower, found


def test_popularity_is_the_share_of_each_item_with_one_observation_spread() -> None:
    ranker = PopularityRanker(4)
    ranker.fit([[0, 2, 2], [2, 1], [1]])
    expected = np.log(np.array([1.25, 2.25, 3.25, 0.25]) / 7.0)
    assert ranker.log_probs([[3], []]) == pytest.approx(np.stack([expected, expected]))


def test_covisitation_is_what_followed_the_last_item_then_popularity() -> None:
    ranker = CoVisitationRanker(4)
    ranker.fit([[0, 1], [0, 1], [0, 2], [3, 3, 2]])
    popular = np.array([3.25, 2.25, 2.25, 2.25]) / 10.0
    popular[1:] = np.array([2.25, 2.25, 2.25]) / 10.0
    after_0 = np.log((np.array([0, 2, 1, 0]) + popular) / 4.0)
    assert ranker.log_probs([[2, 0], []]) == pytest.approx(np.stack([after_0, np.log(popular)]))


@given(lists, st.lists(st.integers(0, ITEMS - 1), max_size=3))
def test_covisitation_ranks_as_the_online_counts_do(sequences: list[list[int]], history: list[int]) -> None:
    ranker, counts = CoVisitationRanker(ITEMS), CoVisitation()
    ranker.fit(sequences)
    for sequence in sequences:
        counts.observe([], sequence)
    known = counts.rank(history, ITEMS)
    assert best_rows(ranker.log_probs([history])[0], ITEMS).tolist()[: len(known)] == known


@transformers
def test_log_probs_are_a_distribution_for_any_history(make: Make) -> None:
    found = make(SMALL).log_probs([[], [3], list(range(ITEMS)), list(range(6, ITEMS))])
    assert found.shape == (4, ITEMS) and found.dtype == np.float32
    assert np.exp(found).sum(axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert (found[2] == found[3]).all() or make is MAKERS["bert4rec"]  # no more than the newest `length` items count
    assert make(SMALL).log_probs([]).shape == (0, ITEMS)


@transformers
def test_histories_do_not_see_each_other(make: Make) -> None:
    model = make(SMALL)
    model.fit(chain()[1][:9], Held([[1]], [2]))
    histories = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9, 10, 11]]
    alone = np.concatenate([model.log_probs([history]) for history in histories])
    assert model.log_probs(histories) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("name", ["sasrec-ce", "fdsa"])
def test_a_later_item_does_not_change_what_was_predicted_before(name: str) -> None:
    network = MAKERS[name](SMALL).network.eval()
    rows = torch.tensor([[PADDING, ITEMS, 3, 4, 5, 6]])
    later = rows.clone()
    later[0, 4:] = torch.tensor([9, 1])
    with torch.no_grad():
        before, after = network(rows), network(later)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


def test_bert4rec_looks_both_ways() -> None:
    network = BERT4Rec(ITEMS, SMALL, device="cpu").network.eval()
    rows = torch.tensor([[3, ITEMS, 5, 6]])
    changed = torch.tensor([[3, ITEMS, 5, 7]])
    with torch.no_grad():
        assert not torch.allclose(network(rows)[:, 1], network(changed)[:, 1])


@pytest.mark.parametrize("name", MAKERS)
def test_padding_before_a_row_changes_nothing(name: str) -> None:
    network = MAKERS[name](SMALL).network.eval()
    short = torch.tensor([[3, 4, 5]])
    padded = torch.tensor([[PADDING, PADDING, PADDING, 3, 4, 5]])
    with torch.no_grad():
        assert network(padded)[:, 3:] == pytest.approx(network(short), abs=1e-6)


@transformers
def test_a_planted_chain_is_learnt(make: Make) -> None:
    follower, sequences = chain()
    config = RankerConfig(width=32, layers=1, length=6, batch=16, learning_rate=5e-3, dropout=0.1, epochs=20, patience=20)
    model = make(config)
    fit = model.fit(sequences)
    ahead = [([*walk, int(follower[walk[-1]])], int(follower[follower[walk[-1]]])) for walk in sequences]
    best = model.log_probs([history for history, _ in ahead]).argmax(axis=1)
    assert (best == [target for _, target in ahead]).mean() > 0.95
    assert 1 <= fit.best <= fit.epochs <= 20 and fit.ndcg > 0.9


@transformers
def test_the_same_seed_gives_the_same_bytes_and_leaves_other_draws_alone(make: Make) -> None:
    sequences = chain(users=20)[1]

    def trained(seed: int) -> bytes:
        model = make(RankerConfig(width=16, layers=1, length=6, batch=8, dropout=0.2, epochs=2, seed=seed))
        model.fit(sequences)
        return b"".join(value.numpy().tobytes() for value in model.network.state_dict().values())

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = trained(1)
    assert torch.equal(torch.rand(3), expected)
    assert first == trained(1)
    assert first != trained(2)


@pytest.mark.parametrize("name", ["sasrec-ce", "bert4rec", "fdsa"])
def test_the_cross_entropy_is_log_n_before_anything_is_learnt(name: str) -> None:
    model = MAKERS[name](RankerConfig(width=64, dropout=0.0, length=6))

    def loss() -> float:
        total, count = model._loss(model._rows(chain()[1]), torch.Generator().manual_seed(0))
        return float(total.detach()) / count

    assert loss() == pytest.approx(math.log(ITEMS), abs=0.2)
    with torch.no_grad():
        model.network.table.zero_()  # type: ignore[operator]
    assert loss() == pytest.approx(math.log(ITEMS), abs=1e-5)


@pytest.mark.parametrize("negatives", [1, 5])
def test_the_binary_loss_is_two_log_two_where_all_scores_are_zero(negatives: int) -> None:
    model = SASRec(ITEMS, SMALL, loss="bce", negatives=negatives, device="cpu")
    with torch.no_grad():
        model.network.table.zero_()
    loss, count = model._loss(model._rows([[1, 2, 3]]), torch.Generator().manual_seed(0))
    assert count == 3
    assert float(loss.detach()) / count == pytest.approx(2 * math.log(2))


def test_a_negative_is_never_the_positive() -> None:
    model = SASRec(2, SMALL, loss="bce", device="cpu")
    with torch.no_grad():
        model.network.table.copy_(torch.tensor([[1.0], [-1.0], [0.0]]).expand(-1, SMALL.width))
    hidden = torch.full((50, SMALL.width), 0.1)
    targets = torch.zeros(50, dtype=torch.int64)
    loss = model._bce(hidden, targets, torch.Generator().manual_seed(0)).detach()
    score = torch.tensor(0.1 * SMALL.width)
    # Positive +score, negative -score: both terms are softplus(-score).
    assert float(loss) == pytest.approx(50 * 2 * float(torch.nn.functional.softplus(-score)), rel=1e-5)


def test_memory_bounds_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> torch.Tensor:
        model = SASRec(ITEMS, RankerConfig(width=16, layers=1, length=6, batch=32, dropout=0.0, epochs=1), device="cpu")
        model.fit(chain()[1])
        return model.network.table.detach()

    whole = trained()
    monkeypatch.setattr(fitting, "CELLS", 6 * ITEMS * 5)
    assert trained() == pytest.approx(whole, abs=1e-5)


def test_what_has_the_same_features_is_alike_to_the_path_of_features() -> None:
    network = FDSA(np.array([[0, 1], [0, 1], [1, -1]]), SMALL, device="cpu").network
    with torch.no_grad():
        vectors = network._features(torch.tensor([[0, 1, 2, 3]]))[0]
    assert torch.equal(vectors[0], vectors[1]) and not torch.allclose(vectors[0], vectors[2])
    # A value that is missing weighs nothing beside one that is known.
    assert vectors[2] == pytest.approx(network.feature_table[network.feature_rows[2, 0]].detach(), abs=1e-6)


@given(lists, st.integers(1, 7))
def test_every_item_is_predicted_once_from_what_stands_before_it(sequences: list[list[int]], length: int) -> None:
    rows = causal_rows(sequences, ITEMS, length)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    real = (inputs != PADDING) & (targets != PADDING)
    pairs = [pair for walk in sequences for pair in zip([ITEMS, *walk], walk, strict=False)]
    assert sorted(zip(inputs[real].tolist(), targets[real].tolist(), strict=True)) == sorted(pairs)
    assert rows.shape[1] <= length + 1


@given(st.integers(0, 1000))
def test_masks_hide_real_items_only_and_at_least_one(seed: int) -> None:
    rows = torch.tensor([[PADDING, PADDING, 1], [1, 2, 3], [4, 5, 6]])
    masked = masks(rows, torch.Generator().manual_seed(seed))
    assert not (masked & (rows == PADDING)).any() and masked.any(1).all()


def test_masks_often_hide_the_newest_item_alone() -> None:
    rows = torch.ones(4000, 10, dtype=torch.int64)
    masked = masks(rows, torch.Generator().manual_seed(0))
    alone = masked[:, -1] & (masked.sum(1) == 1)
    # 0.2 of the rows by intent, and of the others those where chance hides that one (0.2 · 0.8^9) or none (0.8^10).
    assert float(alone.float().mean()) == pytest.approx(0.2 + 0.8 * (0.2 * 0.8**9 + 0.8**10), abs=0.03)
    assert float(masked[:, :-1].float().mean()) == pytest.approx(0.8 * 0.2, abs=0.02)


def test_ranks_count_equals_of_lower_rows_and_never_reach_the_impossible() -> None:
    log_probs = np.array([[-1.0, -2.0, -1.0, -np.inf]] * 4, np.float32)
    assert ranks(log_probs, [0, 1, 2, 3]).tolist() == [1, 3, 2, math.inf]
    assert ndcg10(log_probs, [0, 1, 2, 3]) == pytest.approx((1 + 1 / 2 + 1 / math.log2(3)) / 4)


def test_what_is_held_out_is_not_learnt() -> None:
    sequences = [[user, 50 + user] for user in range(30)] + [[7], []]
    training, held = split(sequences, 3)
    assert len(held.targets) == 3
    assert sum(len(row) for row in training) == 61 - 3
    for history, target in zip(held.histories, held.targets, strict=True):
        assert target == 50 + history[0] and all(target not in row for row in training)


def test_validation_in_blocks_is_that_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    table = np.log(rng.dirichlet(np.ones(ITEMS), 30)).astype(np.float32)
    held = Held([[place] for place in range(30)], rng.integers(0, ITEMS, 30).tolist())
    monkeypatch.setattr(fitting, "CELLS", 7 * ITEMS)
    ndcg, likelihood = validate(lambda histories: table[[row[0] for row in histories]], held, ITEMS)
    assert ndcg == pytest.approx(ndcg10(table, held.targets))
    assert likelihood == pytest.approx(float(table[np.arange(30), held.targets].mean()))


def test_a_few_of_what_is_held_out_are_spread_over_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held([[place] for place in range(10)], list(range(10)))
    assert few(held) == held
    monkeypatch.setattr(fitting, "MOST_VALIDATED", 4)
    assert few(held) == Held([[0], [3], [6], [9]], [0, 3, 6, 9])


def test_training_goes_on_while_the_likelihood_rises_and_keeps_the_best_ranking() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    stopping = Stopping(network, patience=2)
    story = [(0.2, -5.0), (0.5, -4.0), (0.1, -3.0), (0.1, -2.0), (0.1, -2.5), (0.1, -2.4), (0.9, -1.0)]
    ended = None
    for number, (ndcg, likelihood) in enumerate(story, 1):
        with torch.no_grad():
            network.weight.fill_(number)
        if stopping.done(Epoch(number, 1.0, ndcg, likelihood)):
            ended = number
            break
    assert ended == 6
    fit = stopping.finish()
    assert (fit.epochs, fit.best, fit.ndcg) == (6, 2, 0.5)
    assert float(network.weight.detach()) == 2.0


@transformers
def test_sequences_where_nothing_follows_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match="two items"):
        make(SMALL).fit([[1], [], [4]])
