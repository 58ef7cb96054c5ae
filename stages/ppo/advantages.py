"""Generalised advantage estimation (Schulman et al. 2015, equation 16) over padded responses.

    delta_t = r_t + gamma * V_{t+1} - V_t            A_t = delta_t + gamma * lam * A_{t+1}

B rows, T response tokens; V_t is the value of the state in which token t is chosen, and the value after the
last token is 0. A masked token, also one in the middle of a response, does not exist: the tokens around it
are neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.training.masked import Reduce, identity, moments


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    finished: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """rewards, values, mask (B,T) -> advantages and returns (A + V, the critic's targets): (B,T), 0 if
    masked.

    `bootstrap` (B,) is the value after the last token of rows that are not `finished` (B,). Without it a cut
    response ends like a finished one; that is right when the cut has a score of its own.
    """
    next_value = torch.zeros_like(values[:, 0])
    if bootstrap is not None:
        if finished is None:
            raise ValueError("gae: bootstrap needs finished, to know which rows go on")
        next_value = torch.where(finished, next_value, bootstrap)
    advantage = torch.zeros_like(next_value)
    columns: list[Tensor] = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.where(mask, torch.stack(columns[::-1], dim=1), 0)
    return advantages, torch.where(mask, advantages + values, 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = identity) -> float:
    """1 - Var[returns - values] / Var[returns] over the valid tokens of all processes, all (B,T).

    1: the critic is right; 0: as good as a constant; below 0: worse. NaN when the returns do not vary.
    """
    spread = moments(returns, mask, reduce).variance
    residual = moments(returns - values, mask, reduce).variance
    return 1 - residual / spread if spread > 0 else float("nan")
