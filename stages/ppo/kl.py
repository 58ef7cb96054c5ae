"""Estimators of KL(policy || reference) from sampled tokens (Schulman 2020, "Approximating KL divergence").

Per token, with x = log pi - log ref at a token drawn from pi: E[k1] = E[k3] = KL; k2 is biased. Only k1
belongs in the reward: its score-function gradient is that of the KL, while k2, k3 and |k1| have another fixed
point. As a loss only k2 has the gradient of the KL (losses.kl_loss). k3 is measured next to k1: if the two means
disagree, tokens were not drawn from pi, or too few were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.training.masked import Reduce, identity, masked_sum, moments

MAX_ERROR = 0.2
"""Of the controller: a KL far from its target moves the coefficient no faster."""


def k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """log pi - log ref, any shape. Signed, unclamped."""
    return logp - logp_ref


def k2(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2, any shape. As a loss its gradient is that of the KL."""
    return k1(logp, logp_ref).square() / 2


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """ref/pi - 1 - log(ref/pi), any shape; never negative."""
    x = k1(logp, logp_ref)
    return torch.expm1(-x) + x


def adapted(coef: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """The coefficient for the next rollout (Ziegler et al. 2019, equation 4): coef (1 + clip(kl/target - 1, +-.2) n/h).

    `kl` and `target` are nats per RESPONSE: fed with the KL per token, the controller would push the wrong way. `kl`
    is the mean over all processes, so that they agree. `episodes` n are the responses of the rollout that `kl` was
    measured on, `horizon` h is counted in them too; the result is
    positive while n < 5 h.
    """
    error = min(max(kl / target - 1, -MAX_ERROR), MAX_ERROR)
    return coef * (1 + error * episodes / horizon)


def summary(
    logp: Tensor, logp_ref: Tensor, mask: Tensor, reduce: Reduce = identity, weights: Tensor | None = None
) -> dict[str, float]:
    """KL per sequence: the sum over a row's tokens, then the mean over all rows. Tensors are (B,T); `weights` are those
    of tokens that were drawn from another policy.

    `kl_se` and `kl_gap_se` are standard errors: of the k1 mean, and of the difference of the k1 and k3 means
    (the rows are the same, so the difference has an error of its own).
    """
    first, third = (estimator(logp, logp_ref) * (1 if weights is None else weights) for estimator in (k1, k3))
    by_k1 = moments(masked_sum(first, mask, dim=1), reduce=reduce)
    by_k3 = moments(masked_sum(third, mask, dim=1), reduce=reduce)
    gap = moments(masked_sum(first - third, mask, dim=1), reduce=reduce)
    return {
        "objective/kl": by_k1.mean,
        "objective/kl_se": by_k1.standard_error,
        "objective/kl_k3": by_k3.mean,
        "objective/kl_gap_se": gap.standard_error,
    }
