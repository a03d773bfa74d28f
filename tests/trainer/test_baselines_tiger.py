"""TIGER, our own model with m = 1, as a ranker of items."""

import numpy as np
import pytest
import torch

from onerec.errors import UserError
from trainer.baselines.fitting import Held
from trainer.baselines.tiger import BeamRanker, SequenceTraining, fit_sequences, to_batch
from trainer.config import ModelConfig
from trainer.model import OneRec

# Rows 1 and 4 share their semantic ID.
CODES = np.array([[0, 0], [0, 1], [1, 0], [2, 2], [0, 1], [2, 0]], np.int32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def config(m: int) -> ModelConfig:
    return ModelConfig(
        d_model=32, heads=2, encoder_layers=1, decoder_layers=1, d_ff=32, experts=2, levels=2, codes=3, history_length=4,
        session_items=m,
    )


def model(m: int, seed: int = 0) -> OneRec:
    made = OneRec(config(m))
    made.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():  # heads as wide as what is trained, so that the items differ
        for head in made.level_head:
            head.mul_(10)
    return made.eval()


def circle(users: int) -> list[list[int]]:
    return [[(user + step) % 4 for step in range(3 + user % 4)] for user in range(users)]


@pytest.mark.parametrize("m", [1, 3])
def test_wide_beams_give_every_item_the_probability_of_its_id(m: int) -> None:
    made, histories = model(m), [[], [3, 1], [0, 1, 2, 3, 4, 5]]
    found = BeamRanker(made, CODES, width=6).log_probs(histories)
    for history, row in zip(histories, found, strict=True):
        pairs = [(np.array(history, np.int64), np.array([item])) for item in range(len(CODES))]
        batch = to_batch(pairs, CODES, made.config, "cpu")
        first = batch._replace(targets=batch.targets[:, :1], target_mask=batch.target_mask[:, :1])
        with torch.no_grad():
            exact = made.session_log_prob(*first).numpy()
        assert row == pytest.approx(exact, abs=1e-5)
        assert row[1] == row[4]
    likelihood = BeamRanker(made, CODES).likelihood(histories, [0, 3, 5])
    assert likelihood == pytest.approx(float(found[[0, 1, 2], [0, 3, 5]].mean()), abs=1e-5)


def test_narrow_beams_leave_the_other_items_impossible() -> None:
    found = BeamRanker(model(1), CODES, width=1).log_probs([[2]])[0]
    reached = np.flatnonzero(found > -np.inf)
    assert len(np.unique(CODES[reached], axis=0)) == 1


def test_many_histories_are_ranked_each_by_its_own() -> None:
    ranker = BeamRanker(model(1), CODES, width=6)
    histories = [[place % 6] for place in range(150)]
    every = ranker.log_probs(histories)
    assert every[:6] == pytest.approx(np.concatenate([ranker.log_probs([history]) for history in histories[:6]]), abs=1e-5)
    assert every[144:] == pytest.approx(every[:6], abs=1e-5)


def test_a_batch_holds_the_newest_items_and_the_first_that_follow() -> None:
    pairs = [(np.array([5, 0, 1, 2, 3]), np.array([4, 5, 0, 1])), (np.array([], np.int64), np.array([2]))]
    batch = to_batch(pairs, CODES, config(3), "cpu")
    assert batch.history[0].tolist() == CODES[[0, 1, 2, 3]].tolist()
    assert batch.targets[0].tolist() == CODES[[4, 5, 0]].tolist()
    assert batch.targets[1, 0].tolist() == CODES[2].tolist()
    assert batch.history_mask.tolist() == [[True] * 4, [False] * 4]
    assert batch.target_mask.tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize("m", [1, 3])
def test_a_circle_of_items_is_learnt_with_the_same_bytes(m: int) -> None:
    training = SequenceTraining(epochs=12, batch=16, width=6, learning_rate=3e-3, patience=12)
    distinct = CODES[[0, 1, 2, 3]]
    trained, fit = fit_sequences(config(m), distinct, circle(40), training, device="cpu")
    best = BeamRanker(trained, distinct, width=6).log_probs([[0, 1], [1, 2], [2, 3], [3, 0]]).argmax(axis=1)
    assert best.tolist() == [2, 3, 0, 1]
    assert fit.ndcg > 0.9
    short = SequenceTraining(epochs=1, batch=16, width=6, seed=1)
    weights = [
        b"".join(value.numpy().tobytes() for value in fit_sequences(config(m), distinct, circle(20), short, device="cpu")[0]
                 .state_dict().values())
        for _ in range(2)
    ]
    assert weights[0] == weights[1]


def test_sequences_where_nothing_follows_are_refused() -> None:
    with pytest.raises(UserError, match="two items"):
        fit_sequences(config(1), CODES, [[1], [2]], SequenceTraining(epochs=1), held=Held([[1]], [2]), device="cpu")
