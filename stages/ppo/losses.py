"""PPO's clipped losses (Schulman et al. 2017, equation 7) and the KL as a loss, as SUMS over the valid tokens.

All tensors are (B,T). The caller adds up micro-batches and processes and divides once, by the valid tokens of
the whole optimiser step; a mean taken here would weigh short micro-batches more. Stats add up in the same
way, and are divided by the same count; those whose name ends in `_max` are maxima.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.training.masked import masked_sum
from stages.ppo.kl import k2
from stages.ppo.settings import ClipSettings

MAX_LOG_RATIO = 20.0
"""exp(20) is far beyond any clip range; without the bound one stale token overflows to inf * 0."""

Stats = dict[str, Tensor]


def policy_loss(
    logp_new: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor, clip: ClipSettings
) -> tuple[Tensor, Stats]:
    """Sum of max(-A ratio, -A clip(ratio, 1 - policy, 1 + policy_high)), ratio = exp(logp_new - logp_old).

    `clip.policy_high` None: as `clip.policy`. `clip.dual` c > 1 bounds the loss of a token with A < 0 by -c A (Ye et
    al. 2020).
    """
    log_ratio = torch.where(mask, logp_new - logp_old, 0)
    ratio = _bounded_exp(log_ratio)
    gain = torch.where(mask, advantages, 0)
    unclipped = -gain * ratio
    high = clip.policy if clip.policy_high is None else clip.policy_high
    clipped = -gain * ratio.clamp(1 - clip.policy, 1 + high)
    loss = torch.maximum(unclipped, clipped)
    if clip.dual is not None:
        loss = torch.where(gain < 0, torch.minimum(loss, -clip.dual * gain), loss)
    with torch.no_grad():
        active = clipped > unclipped
        stats = {
            "approxkl": log_ratio.square().sum() / 2,
            "clipfrac_low": (active & (ratio < 1)).sum(dtype=ratio.dtype),
            "clipfrac_high": (active & (ratio > 1)).sum(dtype=ratio.dtype),
            "ratio": masked_sum(ratio, mask),
            "ratio_squared": masked_sum(ratio.square(), mask),
            "ratio_clamped": (log_ratio.abs() > MAX_LOG_RATIO).sum(dtype=ratio.dtype),
            "ratio_max": _largest(torch.where(mask, ratio, 0)),
            "log_ratio_max": _largest(log_ratio.abs()),
        }
    return loss.sum(), stats


def kl_loss(
    logp_new: Tensor, logp_old: Tensor, logp_ref: Tensor, mask: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Sum of stop_gradient(ratio) * k2: the KL to the reference as a loss. `weights` are those of tokens that were not
    drawn from the old policy.

    Over tokens drawn from the old policy its expected gradient is that of KL(pi_new || ref), token by token: the
    ratio turns the expectation over the old policy into one over the new, over which k2's gradient k1 grad log pi is
    the KL's. On the first update the ratio is 1. A token's later KL is not charged to it, as it is by k1 in the reward.
    """
    ratio = _bounded_exp(torch.where(mask, logp_new.detach() - logp_old, 0))
    if weights is not None:
        ratio = ratio * weights
    logp_new, logp_ref = (torch.where(mask, x, 0) for x in (logp_new, logp_ref))
    return (ratio * k2(logp_new, logp_ref)).sum()


def _largest(x: Tensor) -> Tensor:
    """Of numbers that are not negative; 0 of none."""
    return x.max() if x.numel() else x.new_zeros(())


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def value_loss(
    values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Stats]:
    """Sum of max((V - R)^2, (V_old + clip(V - V_old, +-clip) - R)^2) / 2; of (V - R)^2 / 2 without clip."""
    values, values_old, returns = (torch.where(mask, x, 0) for x in (values, values_old, returns))
    error = (values - returns).square()
    if clip is None:
        return error.sum() / 2, {"clipfrac": error.new_zeros(())}
    moved = values - values_old
    clipped = (values_old + moved.clamp(-clip, clip) - returns).square()
    active = (clipped > error) & (moved.abs() > clip)  # not where the two differ by rounding
    return torch.maximum(error, clipped).sum() / 2, {"clipfrac": active.sum(dtype=error.dtype)}
