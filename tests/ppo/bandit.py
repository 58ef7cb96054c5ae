"""The problem of E: one action of three, ref = [.5, .3, .2], scores [0, 1, 2]. Its optimum is known in closed form:

    pi* = ref exp(score / beta) / Z          J* = beta log Z

and every expectation is a sum, also over groups of several draws, so gradients are exact and descent has no noise.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from stages.ppo.losses import kl_loss, policy_loss
from stages.ppo.rewards import assemble, at_the_end
from stages.ppo.settings import ClipSettings

REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
SCORES = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
CLIP = ClipSettings()


def tilted(scores: Tensor, beta: float) -> Tensor:
    """ref exp(scores / beta) / Z (3,)."""
    return (REF + scores / beta).softmax(-1)


def objective_gradient(logits: Tensor, beta: float) -> Tensor:
    """grad of J = E[score] - beta KL(pi || ref), by differentiating the sum over the three actions."""
    z = logits.clone().requires_grad_()
    logp = z.log_softmax(-1)
    return torch.autograd.grad((logp.exp() * (SCORES - beta * (logp - REF))).sum(), z)[0]


def descend(gradient: Callable[[Tensor], Tensor], rate: float = 2.0, steps: int = 500, start: Tensor = REF) -> Tensor:
    """Plain gradient descent on the logits, from the reference: the policy (3,) where it ends."""
    logits = start.clone()
    for _ in range(steps):
        logits -= rate * gradient(logits)
    return logits.softmax(-1)


class Draws:
    """All 3^G groups of G draws from softmax(logits), as responses of one token: tensors (3^G G, 1)."""

    def __init__(self, logits: Tensor, group: int = 1, scores: Tensor = SCORES):
        self.logits, self.group = logits.clone().requires_grad_(), group
        arms = torch.tensor(list(product(range(3), repeat=group))).flatten()
        self.policy = self.logits.log_softmax(-1)
        self.logp = self.policy[arms][:, None]
        self.old, self.ref, self.scores = self.logp.detach(), REF[arms][:, None], scores[arms]
        self.mask = torch.ones_like(self.old, dtype=torch.bool)
        self.lengths = torch.ones_like(arms)
        of_group = self.old.view(-1, group).sum(1).exp()
        self.weights = of_group.repeat_interleave(group)[:, None] / group
        """Probability of the group over G, for each of its draws: a weighted sum over draws is an expected mean."""

    def rewards(self, beta: float) -> Tensor:
        """Scores with k1 at `beta` in the reward."""
        return assemble(at_the_end(self.scores, self.lengths, 1), self.old, self.ref, self.lengths, beta)

    def gradient(self, advantages: Tensor, kl_coef: float = 0.0, extra: Tensor | float = 0.0) -> Tensor:
        """Expected gradient wrt the logits of the policy loss, plus the KL as a loss, plus a loss of the test's own.

        The policy loss is linear in the advantages on the first update, so they take the weights. For the KL every
        action is there once with an old log-probability of 0, so that the ratio is its probability.
        """
        loss, _ = policy_loss(self.logp, self.old, advantages * self.weights, self.mask, CLIP)
        each = self.policy[:, None]
        penalty = kl_loss(each, torch.zeros_like(each), REF[:, None], torch.ones(3, 1, dtype=torch.bool))
        return torch.autograd.grad(loss + kl_coef * penalty + extra, self.logits)[0]
