"""PPO's clipped losses (Schulman et al. 2017, equation 7), as SUMS over the valid tokens.

All tensors are (B,T). The caller adds up micro-batches and processes and divides once, by the valid tokens of
the whole optimiser step; a mean taken here would weigh short micro-batches more. Stats add up in the same
way, and are divided by the same count; those whose name ends in `_max` are maxima.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.training.masked import masked_sum

MAX_LOG_RATIO = 20.0
"""exp(20) is far beyond any clip range; without the bound one stale token overflows to inf * 0."""

Stats = dict[str, Tensor]


def policy_loss(
    logp_new: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Stats]:
    """Sum of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)), ratio = exp(logp_new - logp_old).

    `clip_high` None: as `clip`. `dual_clip` c > 1 bounds the loss of a token with A < 0 by -c A (Ye et al.
    2020).
    """
    log_ratio = torch.where(mask, logp_new - logp_old, 0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gain = torch.where(mask, advantages, 0)
    unclipped = -gain * ratio
    clipped = -gain * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(gain < 0, torch.minimum(loss, -dual_clip * gain), loss)
    with torch.no_grad():
        active = clipped > unclipped
        stats = {
            "approxkl": log_ratio.square().sum() / 2,
            "clipfrac_low": (active & (ratio < 1)).sum(dtype=ratio.dtype),
            "clipfrac_high": (active & (ratio > 1)).sum(dtype=ratio.dtype),
            "ratio": masked_sum(ratio, mask),
            "ratio_squared": masked_sum(ratio.square(), mask),
            "ratio_max": torch.where(mask, ratio, 0).max(),
            "log_ratio_max": log_ratio.abs().max(),
        }
    return loss.sum(), stats


def value_loss(
    values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Stats]:
    """Sum of max((V - R)^2, (V_old + clip(V - V_old, +-clip) - R)^2) / 2; of (V - R)^2 / 2 without clip."""
    values, values_old, returns = (torch.where(mask, x, 0) for x in (values, values_old, returns))
    error = (values - returns).square()
    if clip is None:
        return error.sum() / 2, {"clipfrac": error.new_zeros(())}
    clipped = (values_old + (values - values_old).clamp(-clip, clip) - returns).square()
    return torch.maximum(error, clipped).sum() / 2, {"clipfrac": (clipped > error).sum(dtype=error.dtype)}
