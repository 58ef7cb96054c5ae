"""The trainer: what is computed from a batch of responses, and how actor and critic are improved with it.

    trainer.observe(responses, token_scores) -> Rollout      log-probabilities, values, rewards, advantages
    trainer.improve(rollout, index)          -> metrics      epochs of minibatches, actor and critic

It knows nothing of text, data or engines, and not whether roles share a model: whatever a role computes, forward and
backward, happens inside `role.active()`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from align.errors import NumericError
from align.models.roles import Role
from align.training.logprobs import state_logprobs
from align.training.masked import ALONE, Processes, masked_sum
from align.training.optimisers import DataParallelAdamW, NewOptimiser
from align.training.precision import loss_scaler, may_overflow
from align.training.schedule import learning_rate_factor
from stages.ppo.alarms import check_same_policy
from stages.ppo.config import Config
from stages.ppo.ema import Ema
from stages.ppo.estimators import estimate, shape
from stages.ppo.kl import adapted
from stages.ppo.metrics import update_metrics
from stages.ppo.objectives import Objective, Objectives
from stages.ppo.passes import Passes
from stages.ppo.ptx import Demonstrations
from stages.ppo.rewards import assemble
from stages.ppo.rollout import Responses, Rollout

ROUNDING = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
"""Largest difference of a token's log-probability between two passes of the same weights, by the dtype of the passes.
Only other batch shapes round differently."""


class PPOTrainer:
    """Actor, critic (None for estimators without one), frozen reference, and the optimisers.

    `processes` sums and maximises over all processes: every sum over tokens is divided once, by the weight of the whole
    optimiser step over all micro-batches and processes. `precision` is the dtype of the forward passes. On the first
    `warmup` rollouts only the critic is trained. `demonstrations` are what PPO-ptx mixes in. `new_optimiser` makes the
    optimiser of a role, which also holds its gradients.
    """

    def __init__(
        self,
        config: Config,
        actor: Role,
        critic: Role | None,
        reference: Role,
        *,
        seed: int,
        warmup: int = 0,
        processes: Processes = ALONE,
        precision: torch.dtype = torch.float32,
        demonstrations: Demonstrations | None = None,
        new_optimiser: NewOptimiser = DataParallelAdamW,
    ):
        self.config, self.seed, self.warmup = config, seed, warmup
        self.actor, self.critic, self.reference = actor, critic, reference
        self.processes, self.demonstrations = processes, demonstrations
        self.passes = Passes(config, actor, critic, reference, processes, precision)
        self.objectives = Objectives(config, actor, critic, self.passes.autocast)
        self.models = {"actor": actor} | ({} if critic is None else {"critic": critic})
        self.settings = {"actor": config.optim, "critic": config.critic.optim}
        self.precision, self.rounding = precision, ROUNDING[precision]
        self.scaler = loss_scaler(precision, actor.device)
        # A head alone is too small to divide.
        new = {"actor": new_optimiser, "critic": DataParallelAdamW if self.passes.shares_states else new_optimiser}
        self.optimisers = {
            name: new[name](role, self.settings[name], self.scaler) for name, role in self.models.items()
        }
        self.ema = Ema(dict(actor.named_parameters()), config.ema) if config.ema else None
        self.kl_coef = config.kl.coef
        """Weight of the KL; moves with kl.target."""
        self.num_steps = 0
        """Optimiser steps taken."""

    @torch.no_grad()
    def observe(self, responses: Responses, token_scores: Tensor) -> Rollout:
        """What the models say of the responses before they are updated, and the advantages that follow from it.

        `token_scores` (B,T) are the rewards' own: an outcome is on the last token of its row. The old log-probabilities
        are recomputed here, by the code that will compute the new ones, and not taken from the engine: the first ratio
        must be 1.
        """
        config = self.config
        seen = self.passes.look(responses)
        values = seen.get("values")
        token_scores = token_scores.to(seen["logp"].dtype)
        shaped, counted = shape(config, token_scores, responses)
        in_reward = self.kl_coef if config.kl.estimator == "k1" else 0.0
        rewards = assemble(shaped, seen["logp"], seen["reference"], responses.lengths, in_reward)
        advantages, returns = estimate(config, rewards, values, responses, counted, self.processes.sum)
        return Rollout(
            responses,
            shaped.sum(1),
            counted,
            seen["logp"],
            seen["reference"],
            seen["entropy"],
            rewards,
            advantages,
            None if values is None else torch.where(responses.mask, values[:, :-1], 0),
            returns,
        )

    def improve(self, rollout: Rollout, index: int) -> dict[str, float]:
        """Epochs of minibatches over rollout number `index` (from 0). Returns the averages over all updates.

        Raises NumericError when a gradient is not finite, before anything is updated with it, or when the ratio of
        the very first minibatch is not 1.
        """
        config = self.config
        rates = self._set_learning_rates(index)
        train_actor = index >= self.warmup
        totals: dict[str, float] = defaultdict(float)
        updates = 0
        passes = range(index * config.epochs, (index + 1) * config.epochs)
        for minibatch in chain.from_iterable(self._minibatches(len(rollout.counted), number) for number in passes):
            tokens = self._total(rollout.learned[minibatch].sum())
            if tokens == 0:  # all its responses were cut, and cut responses are left out
                continue
            stats = self._step(rollout, minibatch, tokens, train_actor, is_first=updates == 0)
            if stats is None:
                break
            updates += 1
            for name, value in stats.items():
                totals[name] = max(totals[name], value) if name.endswith("_max") else totals[name] + value
        averages = {name: value if name.endswith("_max") else value / updates for name, value in totals.items()}
        if self.ema is not None and train_actor:
            self.ema.update()
        return update_metrics({**averages, "updates": float(updates)}, rates["actor"] if train_actor else 0.0)

    def adapt(self, measured_kl: float, index: int, responses: int) -> None:
        """Moves the coefficient towards kl.target, after the responses of rollout number `index` were rewarded with it
        (Ziegler et al. 2019). Not while only the critic is trained: the KL does not move either."""
        kl = self.config.kl
        if kl.target is not None and index >= self.warmup:
            self.kl_coef = adapted(self.kl_coef, measured_kl, kl.target, kl.horizon, responses)

    def _minibatches(self, rows: int, number: int) -> tuple[Tensor, ...]:
        """The rows of each optimiser step of pass `number`, in a fresh order."""
        generator = torch.Generator().manual_seed(self.seed + 100_003 * number)
        return torch.randperm(rows, generator=generator).tensor_split(self.config.minibatches)

    def _step(
        self, rollout: Rollout, minibatch: Tensor, tokens: float, train_actor: bool, is_first: bool
    ) -> dict[str, float] | None:
        """One optimiser step on some rows of the rollout, which have `tokens` tokens to learn from. Returns its
        averages; None, and no step, when the policy has moved far enough from the one that sampled."""
        weight = tokens
        if self.config.normaliser == "constant":
            weight = self._total(torch.tensor(len(minibatch))) * self.config.rollout.max_response_tokens
        sums = self._gradients(rollout, minibatch, weight, train_actor)
        stats = self._averages(sums, tokens)
        if is_first and train_actor:
            check_same_policy(stats["log_ratio_max"], self.rounding)
        limit = self.config.clip.approxkl
        if limit is not None and stats.get("approxkl", 0.0) > limit:
            self._zero_grad()
            return None
        if train_actor and self.demonstrations is not None:
            stats["ptx_loss"] = self._add_demonstrations()
        self._update(stats, train_actor)
        return stats

    def _update(self, stats: dict[str, float], train_actor: bool) -> None:
        """Clips each model's gradient by its own norm, notes the norms, and steps."""
        trained = {name: one for name, one in self.optimisers.items() if train_actor or name != "actor"}
        for name, optimiser in trained.items():
            stats[f"{name}_grad_norm"] = optimiser.clip(self.settings[name].max_grad_norm)
        if not may_overflow(self.scaler):
            self._refuse_non_finite({name: stats[f"{name}_grad_norm"] for name in trained})
        for optimiser in trained.values():
            optimiser.step()
        self.scaler.update()
        self._zero_grad()
        self.num_steps += 1

    def _gradients(self, rollout: Rollout, minibatch: Tensor, weight: float, train_actor: bool) -> dict[str, Tensor]:
        """Adds the gradients of the minibatch, the actor's and then the critic's; returns sums over its tokens, and
        maxima."""
        minibatch = minibatch[rollout.learned[minibatch].any(1).cpu()]
        objectives: dict[str, Objective] = {}
        policy = partial(self.objectives.policy, kl_coef=self.kl_coef)
        if self.passes.shares_states:
            owner = "actor" if train_actor else "critic"
            objectives[owner] = partial(self.objectives.joint, policy=policy if train_actor else None)
        elif train_actor:
            objectives["actor"] = policy
        if self.critic is not None and not self.passes.shares_states:
            objectives["critic"] = self.objectives.value
        batches = self.passes.micro_batches(rollout.responses, minibatch)
        train_body = train_actor or not self.passes.shares_states
        sums: dict[str, Tensor] = {}
        for name, objective in objectives.items():
            sums |= self._accumulate(name, objective, rollout, batches, weight, train_body)
        return sums

    def _accumulate(
        self,
        name: str,
        objective: Objective,
        rollout: Rollout,
        batches: Sequence[Tensor],
        weight: float,
        train_body: bool,
    ) -> dict[str, Tensor]:
        """One role's gradients, a micro-batch at a time."""
        role, optimiser = self.models[name], self.optimisers[name]
        sums: dict[str, Tensor] = {}
        for index in batches:
            batch = rollout.responses.rows(index)
            with role.active():
                with self.passes.autocast(), torch.set_grad_enabled(train_body):
                    states = self.passes.states(role, batch)
                total, stats = objective(rollout, index, batch, states)
                optimiser.backward(total / weight)
            for stat, value in stats.items():
                known = sums.get(stat, torch.zeros_like(value))
                sums[stat] = torch.maximum(known, value) if stat.endswith("_max") else known + value
        return sums

    def _add_demonstrations(self) -> float:
        """Adds the gradient of PPO-ptx: coef * mean negative log-likelihood per response token (Ouyang et al. 2022).
        It joins the same optimiser step: in one of its own Adam would take the coefficient out again."""
        assert self.demonstrations is not None and self.config.ptx is not None
        batch = self.demonstrations.batch(self.num_steps)
        tokens = self._total(batch.lengths.sum())
        total = 0.0
        for index in self.passes.micro_batches(batch):
            part = batch.rows(index)
            with self.actor.active():
                with self.passes.autocast():
                    states = self.passes.states(self.actor, part)
                    logp, _ = state_logprobs(self.actor, states[:, :-1], part.tokens, part.mask, 1.0)
                loss = -masked_sum(logp, part.mask)
                self.optimisers["actor"].backward(self.config.ptx.coef * loss / tokens)
            total += float(loss.detach())
        return self._total(torch.tensor(total)) / tokens

    def _total(self, count: Tensor) -> float:
        """The sum of a number over all processes."""
        return float(self.processes.sum(count[None].double().to(self.actor.device)))

    def _averages(self, sums: dict[str, Tensor], tokens: float) -> dict[str, float]:
        """Sums over tokens divided by their number, and maxima, over all processes."""
        averages: dict[str, float] = {}
        for are_maxima, reduce in ((False, self.processes.sum), (True, self.processes.max)):
            some = {name: value.double() for name, value in sums.items() if name.endswith("_max") == are_maxima}
            if some:
                found = reduce(torch.stack(list(some.values()))) / (1 if are_maxima else tokens)
                averages |= dict(zip(some, found.tolist(), strict=True))
        return averages

    def _zero_grad(self) -> None:
        for optimiser in self.optimisers.values():
            optimiser.zero_grad()

    def _set_learning_rates(self, index: int) -> dict[str, float]:
        """By rollouts; the actor's schedule begins when the actor does. Returns them by role."""
        rates = {}
        for name, optimiser in self.optimisers.items():
            skipped = self.warmup if name == "actor" else 0
            step, total = max(index - skipped, 0), self.config.rollouts - skipped
            rates[name] = self.settings[name].lr * learning_rate_factor(self.settings[name], step, total)
            optimiser.set_lr(rates[name])
        return rates

    def _refuse_non_finite(self, norms: dict[str, float]) -> None:
        for name, norm in norms.items():
            if not math.isfinite(norm):
                raise NumericError(
                    f"ppo: the {name}'s gradient norm is {norm} at optimiser step {self.num_steps + 1}; nothing was "
                    "updated with it. Lower the learning rate, or normalise the reward: are scores too large?"
                )
