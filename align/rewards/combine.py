"""One score from those of an ensemble of reward models (Coste et al. 2024, section 3)."""

from __future__ import annotations

from torch import Tensor

from align.rewards.settings import RewardTerm


def combine(scores: Tensor, settings: RewardTerm) -> Tensor:
    """(B,) from the scores (K,B) of K reward models; with K = 1 the score itself.

    mean: equation 3. min: their worst-case optimisation, equation 4. mean-variance: their uncertainty-weighted
    optimisation, equation 5, with the variance over K and not K - 1, as it is printed there.
    """
    if settings.combine == "min":
        return scores.amin(0)
    mean = scores.mean(0)
    if settings.combine == "mean":
        return mean
    return mean - settings.variance_coef * scores.var(0, correction=0)


def disagreement(scores: Tensor) -> Tensor:
    """(B,) standard deviation over the K reward models of scores (K,B), of the same variance; 0 for K = 1."""
    return scores.std(0, correction=0)
