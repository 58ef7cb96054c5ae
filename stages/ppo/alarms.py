"""Known failures of PPO, recognised from the metrics of a rollout, each with its likely cause. Torch-free.

An alarm is given once, when its condition has held for `patience` rollouts in a row, and again only after the
condition went away. Rules whose metrics are absent are passed over (a rollout that trains only the critic has
no clip fraction).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from align.errors import NumericError

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Alarm:
    """A failure that was recognised. A fatal one means that going on is useless."""

    name: str
    message: str
    fatal: bool = False


@dataclass(frozen=True)
class Rule:
    """When an alarm is raised. `message` is formatted with the metrics."""

    name: str
    needs: tuple[str, ...]
    holds: Callable[[Metrics], bool]
    message: str
    patience: int = 1
    fatal: bool = False


@dataclass(frozen=True)
class History:
    """What the rules remember between rollouts; plain data, saved in checkpoints."""

    streaks: dict[str, int] = field(default_factory=dict)
    """Rollouts in a row on which a rule's condition held."""

    entropy_start: float | None = None
    """Entropy of the policy on the first rollout."""


def _not_finite(metric: str, what: str) -> Rule:
    return Rule(
        f"not_finite:{metric}",
        (metric,),
        lambda m: not math.isfinite(m[metric]),
        f"{what} is {{{metric}}}: lower the learning rate, or look for non-finite scores in samples.jsonl",
        fatal=True,
    )


RULES = (
    _not_finite("policy/grad_norm", "the actor's gradient norm"),
    _not_finite("val/grad_norm", "the critic's gradient norm"),
    _not_finite("loss/policy_avg", "the policy loss"),
    _not_finite("loss/value_avg", "the value loss"),
    Rule(
        "negative_kl",
        ("objective/kl", "objective/kl_se"),
        lambda m: m["objective/kl"] < -3 * m["objective/kl_se"],
        "objective/kl is {objective/kl:.4g} with a standard error of {objective/kl_se:.2g}, and a KL cannot"
        " be negative: responses are not sampled from the policy (top-k, top-p, a minimum length, a "
        "temperature or stale weights)",
    ),
    Rule(
        "kl_estimators_differ",
        ("objective/kl", "objective/kl_k3", "objective/kl_gap_se"),
        lambda m: abs(m["objective/kl"] - m["objective/kl_k3"]) > 3 * m["objective/kl_gap_se"],
        "objective/kl is {objective/kl:.4g} but objective/kl_k3 is {objective/kl_k3:.4g}, more than three "
        "standard errors apart: either responses are not sampled from the policy, or it has left the "
        "reference so far that tokens the reference likes are never drawn",
        patience=2,
    ),
    Rule(
        "few_responses_end",
        ("val/eos_rate",),
        lambda m: m["val/eos_rate"] < 0.5,
        "only {val/eos_rate:.0%} of responses end: raise rollout.max_response_tokens, or the starting "
        "policy never learned to stop (is EOS in its training data and loss?)",
    ),
    Rule(
        "length_at_cap",
        ("val/response_length", "max_response_tokens"),
        lambda m: m["val/response_length"] >= 0.95 * m["max_response_tokens"],
        "responses are {val/response_length:.1f} tokens long on average, the cap is {max_response_tokens}: "
        "the reward model prefers length, or rollout.max_response_tokens is too low",
    ),
    Rule(
        "score_follows_length",
        ("val/score_length_corr",),
        lambda m: m["val/score_length_corr"] > 0.5,
        "score and length correlate by {val/score_length_corr:.2f}: the reward model may be paying for length",
    ),
    Rule(
        "score_beyond_training",
        ("objective/scores", "max_training_score"),
        lambda m: m["objective/scores"] > m["max_training_score"],
        "the mean score {objective/scores:.3g} is above every score of the reward model's training data "
        "({max_training_score:.3g}): it is being exploited; raise kl.coef or stop earlier",
    ),
    Rule(
        "critic_explains_nothing",
        ("val/explained_variance",),
        lambda m: m["val/explained_variance"] < 0,
        "val/explained_variance is {val/explained_variance:.2f} and has been below 0 for 20 rollouts: the "
        "critic is worse than a constant; raise critic.optim.lr or critic.warmup_rollouts",
        patience=20,
    ),
    Rule(
        "clips_too_much",
        ("policy/clipfrac_avg",),
        lambda m: m["policy/clipfrac_avg"] > 0.3,
        "{policy/clipfrac_avg:.0%} of tokens are clipped: steps are too large; lower optim.lr or epochs",
    ),
    Rule(
        "steps_too_large",
        ("policy/approxkl_avg",),
        lambda m: m["policy/approxkl_avg"] > 0.1,
        "the policy moves by a KL of {policy/approxkl_avg:.3g} per token within a rollout: lower optim.lr or epochs",
    ),
    Rule(
        "entropy_collapse",
        ("policy/entropy_avg", "entropy_start"),
        lambda m: m["policy/entropy_avg"] < 0.1 * m["entropy_start"],
        "entropy is {policy/entropy_avg:.3g}, it was {entropy_start:.3g} at the start: the policy has "
        "stopped exploring; raise kl.coef or entropy_coef",
    ),
)


def check(
    metrics: Metrics,
    history: History,
    max_response_tokens: int,
    max_training_score: float | None = None,
) -> tuple[list[Alarm], History]:
    """The alarms that a rollout's metrics raise, and the history for the next rollout."""
    start = history.entropy_start if history.entropy_start is not None else metrics.get("policy/entropy_avg")
    facts = {**metrics, "max_response_tokens": max_response_tokens}
    facts |= {} if max_training_score is None else {"max_training_score": max_training_score}
    facts |= {} if start is None else {"entropy_start": start}
    alarms, streaks = [], {}
    for rule in RULES:
        if any(name not in facts for name in rule.needs) or not rule.holds(facts):
            continue
        streaks[rule.name] = history.streaks.get(rule.name, 0) + 1
        if streaks[rule.name] == rule.patience:
            alarms.append(Alarm(rule.name, rule.message.format_map(facts), rule.fatal))
    return alarms, History(streaks, start)


def check_same_policy(log_ratio: float, tolerance: float) -> None:
    """Raises if the first minibatch of a rollout, before any update, does not have the ratio 1.

    `log_ratio` is the largest |log pi_new - log pi_old| of a token. The weights are the same, so only
    rounding may differ.
    """
    if not log_ratio <= tolerance:
        raise NumericError(
            f"ppo: log-probabilities of the same policy differ by {log_ratio:.3g} between two forward "
            f"passes, at most {tolerance:.3g} is rounding: is dropout on, or do the passes differ in "
            "padding, temperature or precision?"
        )


def check_starts_at_reference(log_ratio: float, tolerance: float) -> None:
    """Raises if a policy that starts from its reference has a KL to it on the first rollout.

    `log_ratio` is the largest |log pi - log ref| of a token.
    """
    if not log_ratio <= tolerance:
        raise NumericError(
            f"ppo: the policy has not been trained yet, but differs from its reference by {log_ratio:.3g} "
            "in the log-probability of a token: is the reference the model that the policy starts from "
            "(adapter, precision, temperature)?"
        )
