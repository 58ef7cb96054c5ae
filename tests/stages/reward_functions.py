"""Reward functions as a user would write them."""

from __future__ import annotations

from align.rewards.batch import RewardBatch


def brevity(batch: RewardBatch) -> list[float]:
    """Shorter is better."""
    return [-0.1 * len(text) for text in batch.responses]


def steps(batch: RewardBatch) -> list[list[float]]:
    """A process reward: every other token earns something."""
    return [[0.1 * (at % 2) for at in range(len(ids))] for ids in batch.response_ids]
