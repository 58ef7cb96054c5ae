"""What actor and critic minimise on some rows of a rollout: the losses of losses.py on a pass of their models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from align.models.roles import Role
from align.training.logprobs import state_logprobs, state_values
from align.training.masked import masked_sum
from stages.ppo.config import Config
from stages.ppo.losses import kl_loss, policy_loss, value_loss
from stages.ppo.rollout import Responses, Rollout

Objective = Callable[[Rollout, Tensor, Responses, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""What a role minimises on some rows of a rollout, given their numbers, themselves, and their states; a sum over
tokens. And sums and maxima to be shown."""


class Objectives:
    """One for each model that is trained. `autocast` gives the precision of passes."""

    def __init__(self, config: Config, actor: Role, critic: Role | None, autocast: Callable[[], torch.autocast]):
        self.config, self.actor, self.critic, self.autocast = config, actor, critic, autocast

    def policy(
        self, rollout: Rollout, index: Tensor, batch: Responses, states: Tensor, kl_coef: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the actor minimises on some rows: sums over their tokens."""
        config = self.config
        columns = slice(0, batch.width)
        old, reference, advantages, learned = (
            tensor[index, columns]
            for tensor in (rollout.logp_old, rollout.logp_ref, rollout.advantages, rollout.learned)
        )
        with self.autocast():
            logp, entropy = state_logprobs(
                self.actor,
                states[:, :-1],
                batch.tokens,
                learned,
                config.rollout.temperature,
                with_entropy=config.entropy_coef > 0,
            )
        objective, stats = policy_loss(logp, old, advantages, learned, config.clip)
        stats["policy_loss"] = objective.detach()
        if entropy is not None:
            objective = objective - config.entropy_coef * masked_sum(entropy, learned)
        if config.kl.estimator == "k2":
            weights = None if rollout.weights is None else rollout.weights[index, columns]
            penalty = kl_loss(logp, old, reference, learned, weights)
            objective, stats["kl_loss"] = objective + kl_coef * penalty, penalty.detach()
        return objective, stats

    def value(
        self, rollout: Rollout, index: Tensor, batch: Responses, states: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the critic minimises on some rows: sums over their tokens."""
        assert self.critic is not None and rollout.values is not None and rollout.returns is not None
        old, returns, learned = (
            tensor[index, : batch.width] for tensor in (rollout.values, rollout.returns, rollout.learned)
        )
        with self.autocast():
            values = state_values(self.critic, states)[:, :-1]
        value_sum, stats = value_loss(values, old, returns, learned, self.config.clip.value)
        return value_sum, {"value_loss": value_sum.detach(), "value_clipfrac": stats["clipfrac"]}

    def joint(
        self, rollout: Rollout, index: Tensor, batch: Responses, states: Tensor, policy: Objective | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What actor and critic minimise together, where the critic is a head on the actor's states; with no `policy`,
        the critic alone."""
        total, stats = self.value(rollout, index, batch, states)
        total = self.config.critic.coef * total
        if policy is not None:
            policy_sum, policy_stats = policy(rollout, index, batch, states)
            total, stats = policy_sum + total, {**policy_stats, **stats}
        return total, stats
