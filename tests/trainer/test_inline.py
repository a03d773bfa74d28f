"""Algorithm 2 in one process: it raises the reward it is given, repeats byte for byte, and without pairs it is NTP."""

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config import ModelConfig, PreferenceConfig, RewardConfig, RewardModelConfig
from trainer.data import Example
from trainer.inline import AlignConfig, Alignment, align
from trainer.model import OneRec
from trainer.pairs import is_sampled
from trainer.reward import RewardModel
from trainer.sampling import PairMaker, Request

CONFIG = ModelConfig(d_model=32, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, experts=2, levels=2, codes=6,
                     history_length=8, session_items=3)
CODES = np.array([[first, second] for first in range(6) for second in range(4)], np.int32)


class LikesCode(RewardModel):
    """A reward model that is known: the share of the session's items whose first code is 2."""

    def rewards(self, history: Tensor, history_mask: Tensor, sessions: Tensor, session_mask: Tensor) -> Tensor:
        share = (sessions[..., 0] == 2).float().mean(-1)
        return share.unsqueeze(-1).expand(*share.shape, 4)


REWARD = LikesCode(RewardModelConfig(dimension=8, heads=1, hidden=8, buckets=16, levels=2, codes=6, session_items=3))


def examples(count: int = 60) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(f"s{number}", number, rng.integers(0, 24, 4).astype(np.int32),
                rng.choice(24, 3, replace=False).astype(np.int32), True, True)
        for number in range(count)
    ]


def model() -> OneRec:
    made = OneRec(CONFIG)
    made.reset_parameters(torch.Generator().manual_seed(0))
    return made


def mean_reward(policy: OneRec) -> float:
    settings = PreferenceConfig(responses=8)
    maker = PairMaker(policy, REWARD, CODES, settings, RewardConfig(), snapshot_step=0, snapshot_version=0, codebook_version="")
    answers = maker.respond([Request(e.session_id, 0, e.history) for e in examples(20)])
    return float(np.mean([answer.rewards.mean() for answer in answers]))


def run(policy: OneRec, *, ratio: float = 0.5, source: str = "self", snapshots: int = 2, seed: int = 0) -> Alignment:
    torch.set_num_threads(1)
    return align(
        policy, examples(), CODES, REWARD, settings=PreferenceConfig(ratio=ratio, responses=16), reward=RewardConfig(),
        config=AlignConfig(source=source, snapshots=snapshots, passes=3, batch_windows=10,  # type: ignore[arg-type]
                           learning_rate=3e-3, precision="fp32", seed=seed),
    )


def test_alignment_raises_the_reward_of_what_is_generated() -> None:
    policy, trained_on = model(), model()
    done = run(policy)
    run(trained_on, ratio=0.0)
    assert done.pairs > 40 and done.reward_margin > 0.2
    assert mean_reward(policy) > mean_reward(trained_on) + 0.1


@pytest.mark.parametrize("source", ["self", "logged"])
def test_the_same_call_gives_the_same_bytes(source: str) -> None:
    first, second, other = model(), model(), model()
    run(first, source=source)
    run(second, source=source)
    run(other, source=source, ratio=0.3)
    weights = [torch.cat([value.flatten() for value in one.state_dict().values()]) for one in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_each_pass_samples_its_share_of_the_sessions_anew() -> None:
    done = run(model(), ratio=0.3)
    names = [[f"s{number}" if round_ == 0 else f"s{number}#{round_}" for number in range(60)] for round_ in range(3)]
    sampled = sum(is_sampled(name, 0.3) for group in names for name in group)
    assert done.pairs + sum(done.drops.values()) == sampled
    assert done.steps == 18 and 0 < done.preference_steps <= 18


def test_logged_pairs_set_the_users_session_against_the_seed_models() -> None:
    policy = model()
    done = run(policy, source="logged", snapshots=0)
    lines = [line for line in done.lines if "chosen_logratios" in line]
    last = {name: np.mean([line[name] for line in lines[-4:]]) for name in ("chosen_logratios", "rejected_logratios")}
    assert last["chosen_logratios"] > last["rejected_logratios"]


def test_without_pairs_it_is_next_token_prediction() -> None:
    policy = model()
    done = run(policy, ratio=0.0)
    assert done.pairs == done.preference_steps == 0
    assert all("preference" not in line for line in done.lines)
    ntp = [line["ntp"] for line in done.lines]
    assert np.mean(ntp[-3:]) < np.mean(ntp[:3])
