"""What a rollout looks like before the update, and the names of what an update reports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from align.training.masked import ALONE, Processes, correlation, largest, masked_sum, moments
from stages.ppo import kl
from stages.ppo.advantages import explained_variance
from stages.ppo.rollout import Rollout
from stages.ppo.scorer import Scores


@dataclass
class Phases:
    """Seconds of the phases of a rollout, as metrics. A GPU may still be at work when a phase ends."""

    metrics: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of what is done inside, under the metric's name."""
        started = time.monotonic()
        yield
        self.metrics[name] = self.metrics.get(name, 0.0) + time.monotonic() - started


def rollout_metrics(rollout: Rollout, coef: float, given: Scores, processes: Processes = ALONE) -> dict[str, float]:
    """Token averages are over valid tokens of all processes. `given` are the scores before any rule."""
    reduce = processes.sum
    raw_scores = given.total.to(rollout.scores.device)
    mask, lengths = rollout.responses.mask, rollout.responses.lengths.double()
    finished = rollout.responses.finished
    kl_summary = kl.summary(rollout.logp_old, rollout.logp_ref, mask, reduce, rollout.weights)
    scores = moments(rollout.scores, reduce=reduce)
    num_finished = float(reduce(finished.sum()[None].double()))
    return {
        **kl_summary,
        "objective/scores": scores.mean,
        "objective/scores_std": scores.variance**0.5,
        "objective/scores_min": -largest(-rollout.scores, processes),
        "objective/scores_max": largest(rollout.scores, processes),
        "objective/raw_scores": moments(raw_scores, reduce=reduce).mean,
        "objective/kl_coef": coef,
        "objective/non_score_reward": -coef * kl_summary["objective/kl"],
        "objective/rlhf_reward": scores.mean - coef * kl_summary["objective/kl"],
        "objective/entropy": moments(masked_sum(rollout.entropy, mask, dim=1), reduce=reduce).mean,
        "policy/entropy_avg": moments(rollout.entropy, mask, reduce).mean,
        "val/response_length": moments(lengths, reduce=reduce).mean,
        "val/num_eos_tokens": num_finished,
        "val/eos_rate": num_finished / moments(lengths, reduce=reduce).count,
        # Of the scores before any rule: the missing-EOS rule lowers those of the longest responses.
        "val/score_length_corr": correlation(raw_scores, lengths, reduce),
        **_cut_metrics(rollout, processes),
        **_reward_metrics(given, processes),
        **_critic_metrics(rollout, processes),
    }


def _cut_metrics(rollout: Rollout, processes: Processes) -> dict[str, float]:
    """Share of the responses that end which score below the mean of those that were cut. Nothing when all end."""
    finished = rollout.responses.finished
    cut, ended = (moments(rollout.scores, mask, processes.sum) for mask in (~finished, finished))
    if not cut.count or not ended.count:
        return {}
    return {"val/cut_rank": moments((rollout.scores < cut.mean).double(), finished, processes.sum).mean}


def _reward_metrics(given: Scores, processes: Processes) -> dict[str, float]:
    """Mean of each term, where there is more than one, and the disagreement within ensembles."""
    terms = given.terms if len(given.terms) > 1 else {}
    metrics = {f"reward/{name}": moments(values, reduce=processes.sum).mean for name, values in terms.items()}
    if given.disagreement is not None:
        metrics["reward/disagreement"] = moments(given.disagreement, reduce=processes.sum).mean
    return metrics


def _critic_metrics(rollout: Rollout, processes: Processes) -> dict[str, float]:
    if rollout.values is None or rollout.returns is None:
        return {}
    returns = moments(rollout.returns, rollout.learned, processes.sum)
    return {
        "val/explained_variance": explained_variance(rollout.values, rollout.returns, rollout.learned, processes.sum),
        "val/return_mean": returns.mean,
        "val/return_var": returns.variance,
    }


def mismatch(engine_logprobs: Tensor, rollout: Rollout, mask: Tensor, processes: Processes = ALONE) -> dict[str, float]:
    """How the engine's log-probabilities (B,T) of the tokens in `mask`, which it sampled from the policy at hand,
    differ from the trainer's: the KL per token from engine to trainer, by k3, and mean and maximum of the absolute
    difference."""
    theirs = engine_logprobs.to(rollout.logp_old)
    gap = torch.where(mask, theirs - rollout.logp_old, 0).abs()
    return {
        "samples/mismatch_kl": moments(kl.k3(theirs, rollout.logp_old), mask, processes.sum).mean,
        "samples/mismatch_mean": moments(gap, mask, processes.sum).mean,
        "samples/mismatch_max": largest(gap, processes),
    }


def staleness_metrics(versions: Tensor, index: int, mask: Tensor, processes: Processes = ALONE) -> dict[str, float]:
    """How many rollouts before this one, number `index`, the tokens (B,T) that are learned from were sampled."""
    ages = index - versions
    return {
        "rollout/staleness_mean": moments(ages.double(), mask, processes.sum).mean,
        "rollout/staleness_max": largest(ages[mask], processes),
    }


def flight_metrics(counts: Mapping[str, int], grown: int, processes: Processes = ALONE) -> dict[str, float]:
    """What became of the responses in flight (see stages.ppo.inflight.Batch)."""
    *totals, all_grown = processes.sum(torch.tensor([*counts.values(), grown], dtype=torch.float64)).tolist()
    metrics = dict(zip(counts, totals, strict=True))
    if "rollout/carried" in metrics:
        metrics["rollout/carried"] /= all_grown
    return metrics


def distinct_ngrams(responses: Sequence[Sequence[int]], n: int = 2) -> float:
    """Different n-grams of tokens over all n-grams (Li et al. 2016, distinct-n). NaN when there is none."""
    grams = [tuple(ids[start : start + n]) for ids in responses for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def update_metrics(averages: dict[str, float], learning_rate: float) -> dict[str, float]:
    """The trainer's averages under the names that PPO dashboards know."""
    metrics = {"lr": learning_rate, "policy/updates": averages["updates"]}
    if "value_loss" in averages:
        metrics |= {
            "loss/value_avg": averages["value_loss"],
            "val/clipfrac_avg": averages["value_clipfrac"],
            "val/grad_norm": averages["critic_grad_norm"],
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
            "val/ratio_clamped": averages["ratio_clamped"],
        }
    for ours, theirs in (("kl_loss", "loss/kl_avg"), ("ptx_loss", "loss/ptx_avg")):
        if ours in averages:
            metrics[theirs] = averages[ours]
    return metrics
