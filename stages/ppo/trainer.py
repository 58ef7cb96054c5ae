"""The PPO trainer: what is computed from a batch of responses, and how the two models are improved with it.

    trainer.observe(responses, scores) -> Rollout      log-probabilities, values, rewards, advantages
    trainer.improve(rollout, index)    -> metrics      epochs of minibatches, actor and critic

It knows nothing of text, data or engines. `actor`, `critic` and `reference` are modules with the call signature of a
Hugging Face model; actor and reference give logits (B,L,V), the critic (B,L,1).
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from align.errors import NumericError
from align.recipe.settings import OptimSettings
from align.training.logprobs import response_logprobs, response_values
from align.training.masked import ALONE, Processes, correlation, masked_sum, moments, whiten
from align.training.schedule import learning_rate_factor
from stages.ppo import kl
from stages.ppo.advantages import explained_variance, gae
from stages.ppo.alarms import check_same_policy
from stages.ppo.config import Config
from stages.ppo.losses import policy_loss, value_loss
from stages.ppo.rewards import assemble, missing_eos
from stages.ppo.rollout import Responses, Rollout

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Largest difference of a token's log-probability between two passes of the same weights, by the dtype of the passes.
Only other batch shapes round differently."""


class PPOTrainer:
    """Actor, critic, frozen reference, and their two optimisers.

    `processes` sums and maximises over all processes: every sum over tokens is divided once, by the valid tokens of
    the whole optimiser step over all micro-batches and processes. `precision` is the dtype of the forward passes.
    """

    def __init__(
        self,
        config: Config,
        actor: nn.Module,
        critic: nn.Module,
        reference: nn.Module,
        *,
        seed: int,
        processes: Processes = ALONE,
        precision: torch.dtype = torch.float32,
    ):
        self.config, self.seed = config, seed
        self.actor, self.critic, self.reference = actor, critic, reference
        self.processes = processes
        self.optimisers = {
            "actor": _optimiser(actor, config.optim),
            "critic": _optimiser(critic, config.critic.optim),
        }
        self.precision, self.rounding = precision, ROUNDING[precision]
        self.num_steps = 0
        """Optimiser steps taken: rollouts x epochs x minibatches."""

    @torch.no_grad()
    def observe(self, responses: Responses, scores: Tensor) -> Rollout:
        """What the models say of the responses before they are updated, and the advantages that follow from it.

        `scores` (B,) are the reward model's. The old log-probabilities are recomputed here, by the code that will
        compute the new ones, and not taken from the engine: the first ratio must be 1.
        """
        config, mask = self.config, responses.mask
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for index in torch.arange(len(responses.lengths)).split(config.micro_batch_size):
            batch = responses.rows(index)
            arguments = (batch.input_ids, batch.attention_mask, batch.width)
            temperature = config.rollout.temperature
            with self._autocast():
                logp, entropy = response_logprobs(self.actor, *arguments, temperature, with_entropy=True)
                reference, _ = response_logprobs(self.reference, *arguments, temperature)
                values = response_values(self.critic, *arguments)
            assert entropy is not None
            for name, part in zip(
                ("logp", "ref", "values", "entropy"), (logp, reference, values, entropy), strict=True
            ):
                parts[name].append(nn.functional.pad(part, (0, responses.width - batch.width)))
        logp, logp_ref, values, entropy = (
            torch.where(mask, torch.cat(parts[name]), 0) for name in ("logp", "ref", "values", "entropy")
        )
        scores = missing_eos(scores.to(logp.dtype), responses.finished, config.missing_eos)
        rewards = assemble(scores, logp, logp_ref, responses.lengths, config.kl.coef)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask, self.processes.sum)
        return Rollout(responses, scores, logp, logp_ref, values, rewards, advantages, returns, entropy)

    def improve(self, rollout: Rollout, index: int) -> dict[str, float]:
        """Epochs of minibatches over rollout number `index` (from 0). Returns the averages over all updates.

        Raises NumericError when a gradient is not finite, before anything is updated with it, or when the ratio of
        the very first minibatch is not 1.
        """
        config = self.config
        self._set_learning_rates(index)
        train_actor = index >= config.critic.warmup_rollouts
        totals: dict[str, float] = defaultdict(float)
        rows = len(rollout.responses.lengths)
        for epoch in range(config.epochs):
            generator = torch.Generator().manual_seed(self.seed + 100_003 * (index * config.epochs + epoch))
            order = torch.randperm(rows, generator=generator)
            for number, minibatch in enumerate(order.tensor_split(config.minibatches)):
                stats = self._step(rollout, minibatch, train_actor, is_first=epoch == number == 0)
                for name, value in stats.items():
                    totals[name] = max(totals[name], value) if name.endswith("_max") else totals[name] + value
        count = config.epochs * config.minibatches
        averages = {name: value if name.endswith("_max") else value / count for name, value in totals.items()}
        return _named(averages, self.optimisers["actor"].param_groups[0]["lr"] if train_actor else 0.0)

    def _step(self, rollout: Rollout, minibatch: Tensor, train_actor: bool, is_first: bool) -> dict[str, float]:
        """One optimiser step of both models on some rows of the rollout. Returns its averages."""
        weight = float(self.processes.sum(rollout.responses.mask[minibatch].sum()[None].double()))
        sums: dict[str, Tensor] = {}
        for part in minibatch.split(self.config.micro_batch_size):
            for name, value in self._micro_batch(rollout, part, weight, train_actor).items():
                known = sums.get(name, torch.zeros_like(value))
                sums[name] = torch.maximum(known, value) if name.endswith("_max") else known + value
        stats = {name: self._average(name, value, weight) for name, value in sums.items()}
        if is_first and train_actor:
            check_same_policy(stats["log_ratio_max"], self.rounding)
        models = {"actor": self.actor, "critic": self.critic} if train_actor else {"critic": self.critic}
        settings = {"actor": self.config.optim, "critic": self.config.critic.optim}
        for name, model in models.items():
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings[name].max_grad_norm)
            stats[f"{name}_grad_norm"] = float(norm)
        self._refuse_non_finite({name: stats[f"{name}_grad_norm"] for name in models})
        for name in models:
            self.optimisers[name].step()
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        self.num_steps += 1
        return stats

    def _micro_batch(self, rollout: Rollout, index: Tensor, weight: float, train_actor: bool) -> dict[str, Tensor]:
        """Adds the gradients of some rows; returns sums over their tokens."""
        config, batch = self.config, rollout.responses.rows(index)
        arguments, mask = (batch.input_ids, batch.attention_mask, batch.width), batch.mask
        logp_old, advantages, old_values, returns = (
            tensor[index, : batch.width]
            for tensor in (rollout.logp_old, rollout.advantages, rollout.values, rollout.returns)
        )
        stats: dict[str, Tensor] = {}
        if train_actor:
            with self._autocast():
                logp, entropy = response_logprobs(
                    self.actor, *arguments, config.rollout.temperature, with_entropy=config.entropy_coef > 0
                )
            policy_sum, stats = policy_loss(logp, logp_old, advantages, mask, config.clip.policy)
            stats["policy_loss"] = policy_sum.detach()
            objective = policy_sum
            if entropy is not None:
                objective = policy_sum - config.entropy_coef * masked_sum(entropy, mask)
            (objective / weight).backward()
        with self._autocast():
            values = response_values(self.critic, *arguments)
        value_sum, value_stats = value_loss(values, old_values, returns, mask, config.clip.value)
        (value_sum / weight).backward()
        return {**stats, "value_loss": value_sum.detach(), "value_clipfrac": value_stats["clipfrac"]}

    def _average(self, name: str, value: Tensor, weight: float) -> float:
        """A sum over tokens divided by their number, or a maximum, over all processes."""
        if name.endswith("_max"):
            return float(self.processes.max(value[None].double()))
        return float(self.processes.sum(value[None].double())) / weight

    def _autocast(self) -> torch.autocast:
        device = next(self.actor.parameters()).device.type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision is not torch.float32)

    def _set_learning_rates(self, index: int) -> None:
        settings = {"actor": self.config.optim, "critic": self.config.critic.optim}
        for name, optimiser in self.optimisers.items():
            factor = learning_rate_factor(settings[name], index, self.config.rollouts)
            for group in optimiser.param_groups:
                group["lr"] = settings[name].lr * factor

    def _refuse_non_finite(self, norms: dict[str, float]) -> None:
        for name, norm in norms.items():
            if not math.isfinite(norm):
                raise NumericError(
                    f"ppo: the {name}'s gradient norm is {norm} at optimiser step {self.num_steps + 1}; nothing was "
                    "updated with it. Lower the learning rate, or look for non-finite scores in samples.jsonl"
                )


def rollout_metrics(
    rollout: Rollout, coef: float, raw_scores: Tensor, processes: Processes = ALONE
) -> dict[str, float]:
    """What a rollout looks like before the update. Token averages are over valid tokens of all processes."""
    reduce = processes.sum
    mask, lengths = rollout.responses.mask, rollout.responses.lengths.double()
    finished = rollout.responses.finished
    kl_summary = kl.summary(rollout.logp_old, rollout.logp_ref, mask, reduce)
    scores = moments(rollout.scores, reduce=reduce)
    returns = moments(rollout.returns, mask, reduce)
    num_finished = float(reduce(finished.sum()[None].double()))
    return {
        **kl_summary,
        "objective/scores": scores.mean,
        "objective/scores_std": scores.variance**0.5,
        "objective/scores_min": -float(processes.max(-rollout.scores.min()[None].double())),
        "objective/scores_max": float(processes.max(rollout.scores.max()[None].double())),
        "objective/raw_scores": moments(raw_scores, reduce=reduce).mean,
        "objective/non_score_reward": -coef * kl_summary["objective/kl"],
        "objective/rlhf_reward": scores.mean - coef * kl_summary["objective/kl"],
        "objective/entropy": moments(masked_sum(rollout.entropy, mask, dim=1), reduce=reduce).mean,
        "policy/entropy_avg": moments(rollout.entropy, mask, reduce).mean,
        "val/explained_variance": explained_variance(rollout.values, rollout.returns, mask, reduce),
        "val/return_mean": returns.mean,
        "val/return_var": returns.variance,
        "val/response_length": moments(lengths, reduce=reduce).mean,
        "val/num_eos_tokens": num_finished,
        "val/eos_rate": num_finished / moments(lengths, reduce=reduce).count,
        # Of the reward model's own scores: the missing-EOS rule lowers those of the longest responses.
        "val/score_length_corr": correlation(raw_scores, lengths, reduce),
    }


def _named(averages: dict[str, float], learning_rate: float) -> dict[str, float]:
    """The trainer's averages under the names that PPO dashboards know."""
    metrics = {
        "loss/value_avg": averages["value_loss"],
        "val/clipfrac_avg": averages["value_clipfrac"],
        "val/grad_norm": averages["critic_grad_norm"],
        "lr": learning_rate,
    }
    if "policy_loss" in averages:
        low, high = averages["clipfrac_low"], averages["clipfrac_high"]
        metrics |= {
            "loss/policy_avg": averages["policy_loss"],
            "policy/approxkl_avg": averages["approxkl"],
            "policy/clipfrac_avg": low + high,
            "policy/clipfrac_low": low,
            "policy/clipfrac_high": high,
            "policy/grad_norm": averages["actor_grad_norm"],
            "val/ratio": averages["ratio"],
            "val/ratio_var": averages["ratio_squared"] - averages["ratio"] ** 2,
            "val/ratio_max": averages["ratio_max"],
        }
    return metrics


def _optimiser(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
