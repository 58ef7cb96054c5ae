"""The loss of KTO (Ethayarajh et al. 2024): pure functions of log-ratios, and the pairs that its KL is estimated on.

B judged answers; h(y) = log pi(y | x) - log ref(y | x), in nats, summed over the tokens of an answer.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def kl_estimate(mismatched: Tensor) -> Tensor:
    """z0 = max(0, mean h(y')) of answers y' to other prompts (eq. 7): mismatched (B,) -> a scalar without gradient. NaN
    marks a prompt with no other answer; with none at all z0 is 0."""
    mean = mismatched.detach().nanmean()
    return torch.where(mean.isnan(), 0, mean).clamp(min=0)


def kto(log_ratios: Tensor, is_good: Tensor, kl: Tensor, beta: float, good_weight: float, bad_weight: float) -> Tensor:
    """The loss of each answer (B,), eq. 7 and 8: w_good (1 - s(beta (h - z0))) of good answers, w_bad (1 - s(beta (z0 -
    h))) of bad ones. The gain of an answer saturates in both directions, as in prospect theory."""
    distance = beta * (log_ratios - kl)
    return torch.where(is_good, good_weight * torch.sigmoid(-distance), bad_weight * torch.sigmoid(distance))


def class_weights(num_good: int, num_bad: int) -> tuple[float, float]:
    """Weights that let either class count as much as the other, with the mean weight of an answer 1: n / (2 n_good) and
    n / (2 n_bad). The lower end of the paper's range, 1 <= w_good n_good / (w_bad n_bad) <= 4/3."""
    total = num_good + num_bad
    return total / (2 * num_good), total / (2 * num_bad)


def mismatches(prompts: Sequence[Hashable], seed: int) -> list[int | None]:
    """For every row another row whose prompt is a different one: the next such row of a random cycle through all rows,
    so that nearly every answer is taken once. None where all prompts are the same.

    The paper takes the neighbour in the batch. Where the two answers of a pair are neighbours, that is an answer to the
    same prompt, and no estimate of the KL.
    """
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    chosen: list[int | None] = [None] * len(prompts)
    for here in reversed(order * 2):  # the second round is for rows at the end, which ask those at the start
        after = following[here]
        chosen[here] = after if prompts[after] != prompts[here] else chosen[after]
    return chosen
