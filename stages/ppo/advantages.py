"""Estimators of the advantage over padded responses: how much better a token was than what was to be expected.

B rows, T response tokens. Rewards, masks and advantages are (B,T); advantages are 0 at masked slots. A masked token,
also one in the middle of a response, does not exist: the tokens around it are neighbours.

`gae` has a critic. The others have none: `reward_to_go`, and two that compare the responses to one prompt, which are
`group` consecutive rows on one process. Their `counted` (B,) bool are the rows that take part; the others are in no
baseline and get 0, and so does a group with fewer than two that count: there is nothing to compare with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align.training.masked import Reduce, identity, masked_sum, moments

NO_SPREAD = 1e-6
"""A group whose returns have a standard deviation below this are all alike: the rest is rounding, not signal."""


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float | Tensor,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, equation 16):

        delta_t = r_t + gamma * V_{t+1} - V_t            A_t = delta_t + gamma * lam * A_{t+1}

    `values` (B,T) are those of the states in which tokens are chosen; `bootstrap` (B,) that of the state after the
    last token: 0 for a row that ended, and for all rows when None. `lam` may be (B,), one per row. Returns the
    advantages and the critic's targets A + V, both (B,T) and 0 where masked.
    """
    next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap.to(values)
    advantage = torch.zeros_like(next_value)
    decay = gamma * (lam.to(values) if isinstance(lam, Tensor) else lam)
    columns: list[Tensor] = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + decay * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.where(mask, torch.stack(columns[::-1], dim=1), 0)
    return advantages, torch.where(mask, advantages + values, 0)


def length_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """1 - 1/(alpha l), not below 0, for responses of l tokens: (B,) -> (B,) float64 (Yue et al. 2025, length-adaptive
    GAE). The sum of lam^t over a long response is then alpha l: the share of it that a reward reaches stays the same.
    """
    return (1 - 1 / (alpha * lengths.double())).clamp(min=0)


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ... to the end of the row (REINFORCE; Hu 2025 whitens it over all
    rows): GAE at lambda 1 with a critic that says 0."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def leave_one_out(rewards: Tensor, mask: Tensor, group: int, counted: Tensor | None = None) -> Tensor:
    """RLOO (Kool et al. 2019; Ahmadian et al. 2024): on every token of a row, its return (the sum of its rewards) less
    the mean return of the OTHER rows of its group. That mean knows nothing of the row, so it does not bias."""
    groups = _groups(rewards, mask, group, counted)
    advantages = (groups.returns - groups.mean) * groups.count / (groups.count - 1).clamp(min=1)
    return _on_every_token(torch.where(groups.counted, advantages, 0), rewards, mask)


def group_relative(
    rewards: Tensor, mask: Tensor, group: int, divide_by_std: bool, counted: Tensor | None = None
) -> Tensor:
    """GRPO (Shao et al. 2024): on every token of a row, its return less the mean of ALL rows of its group, over their
    standard deviation; Dr. GRPO (Liu et al. 2025) without the division.

    The paper's std is that of the G returns at hand, so it is the biased one, with no eps: a group's advantages have
    variance 1, and neither a shift nor a scale of its scores changes them. Implementations with the unbiased std have
    advantages smaller by sqrt((G-1)/G). A group without spread gives 0.
    """
    groups = _groups(rewards, mask, group, counted)
    advantages = groups.returns - groups.mean
    if divide_by_std:
        std = (torch.where(groups.counted, advantages, 0).square().sum(1, keepdim=True) / groups.count).sqrt()
        advantages = torch.where(std < NO_SPREAD, 0, advantages / std)
    return _on_every_token(torch.where(groups.counted, advantages, 0), rewards, mask)


class _Groups(NamedTuple):
    """Returns by group, in float64: in float32 the mean of three equal returns may differ from them."""

    returns: Tensor
    """(B/group, group)."""
    counted: Tensor
    """(B/group, group) bool."""

    @property
    def count(self) -> Tensor:
        """(B/group, 1), not below 1."""
        return self.counted.sum(1, keepdim=True).clamp(min=1)

    @property
    def mean(self) -> Tensor:
        """(B/group, 1) over the rows that count."""
        return torch.where(self.counted, self.returns, 0).sum(1, keepdim=True) / self.count


def _groups(rewards: Tensor, mask: Tensor, group: int, counted: Tensor | None) -> _Groups:
    returns = masked_sum(rewards.double(), mask, dim=1)
    everyone = torch.ones_like(returns, dtype=torch.bool) if counted is None else counted
    return _Groups(returns.view(-1, group), everyone.view(-1, group))


def _on_every_token(advantages: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """(B/group, group) -> (B,T) in the dtype of `rewards`."""
    return torch.where(mask, advantages.flatten()[:, None].to(rewards), 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = identity) -> float:
    """1 - Var[returns - values] / Var[returns] over the valid tokens of all processes, all (B,T).

    1: the critic is right; 0: as good as a constant; below 0: worse. NaN when the returns do not vary.
    """
    spread = moments(returns, mask, reduce).variance
    residual = moments(returns - values, mask, reduce).variance
    return 1 - residual / spread if spread > 0 else float("nan")
