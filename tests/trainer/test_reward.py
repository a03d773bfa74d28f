"""The reward model against eq. 5-7, and what must not change its rewards."""

import torch

from trainer.config import RewardModelConfig
from trainer.reward import RewardBatch, RewardModel, RewardOptimizer

CONFIG = RewardModelConfig(dimension=16, heads=2, hidden=8, buckets=64, history_length=8, codes=16)


def batch_of(seed, sessions=6, windows=3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (sessions, 1), generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (sessions, windows, 1), generator=generator)
    mask[0, -1] = False
    return RewardBatch(
        torch.randint(0, 16, (sessions, 8, 3), generator=generator),
        torch.arange(8) < lengths,
        torch.randint(0, 16, (sessions, windows, 5, 3), generator=generator),
        mask,
        torch.rand(sessions, windows, 4, generator=generator),
    )


def test_steps_lower_the_loss_of_a_batch():
    torch.manual_seed(0)
    optimizer = RewardOptimizer(RewardModel(CONFIG), 1e-2)
    losses = [optimizer.step(batch_of(0))["loss"] for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1
