"""Truncated importance sampling: what an engine sampled, weighted as if the policy itself had.

An engine computes with other kernels, perhaps in another precision, so it samples from a slightly other distribution
than the one that is trained. E_policy[f] = E_engine[w f] with w = pi_policy / pi_engine; a cap trades a little bias for
a bounded variance (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
PPO's own ratio, from the trainer's log-probability before the update to the one during it, is another matter.

The weights multiply the advantages: the surrogate, its clipped and its dual-clipped form are all homogeneous in them,
so this is the same as weighting the loss of each token, and no gradient flows through a weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from align.training.masked import ALONE, Processes, largest, masked_sum, moments
from stages.ppo.rollout import Rollout


def importance_weights(
    engine_logprobs: Tensor, rollout: Rollout, kind: Literal["token", "sequence-mask", "off"], cap: float
) -> Tensor:
    """Weights (B,T) of the tokens of a rollout, 1 where masked. `engine_logprobs` (B,T) are those of the engine that
    sampled.

    token: min(w, cap). sequence-mask: the product of w over the response, or 0 where it is above the cap.
    """
    mask = rollout.responses.mask
    log_weights = torch.where(mask, rollout.logp_old - engine_logprobs.to(rollout.logp_old), 0)
    if kind == "off":
        return torch.ones_like(log_weights)
    if kind == "token":
        return log_weights.exp().clamp(max=cap)
    product = masked_sum(log_weights, mask, dim=1).exp()[:, None]
    return torch.where(mask, torch.where(product > cap, 0, product), 1)


def correction_metrics(weights: Tensor, rollout: Rollout, processes: Processes = ALONE) -> dict[str, float]:
    """Mean weight, its lowest and highest, over valid tokens."""
    mask = rollout.responses.mask
    return {
        "correction/weight_mean": moments(weights, mask, processes.sum).mean,
        "correction/weight_min": -largest(-weights[mask], processes),
        "correction/weight_max": largest(weights[mask], processes),
    }
