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

    first: dict[str, float] = field(default_factory=dict)
    """What the metrics in `REMEMBERED` were when they were first measured."""


REMEMBERED = (
    "policy/entropy_avg",
    "objective/scores",
    "reward/disagreement",
    "samples/distinct_2",
    "val/score_length_corr",
    "val/response_length",
)
"""Metrics that rules compare with their first value, which they know as `first/...`."""


RULES = (
    Rule(
        "not_finite",
        ("loss/value_avg",),
        lambda m: not math.isfinite(m["loss/value_avg"]),
        "the value loss is {loss/value_avg}: scores are too large for float32; normalise the reward, or set score_clip",
        fatal=True,
    ),
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
        patience=5,
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
        "responses are {val/response_length:.1f} tokens long on average, the cap is {max_response_tokens:.0f}: "
        "the reward model prefers length, or rollout.max_response_tokens is too low",
    ),
    Rule(
        "score_follows_length",
        (
            "val/score_length_corr",
            "first/val/score_length_corr",
            "val/response_length",
            "first/val/response_length",
        ),
        lambda m: (
            m["val/score_length_corr"] > 0.5
            and (
                m["val/score_length_corr"] > m["first/val/score_length_corr"] + 0.1
                or m["val/response_length"] > 1.25 * m["first/val/response_length"]
            )
        ),
        "score and length correlate by {val/score_length_corr:.2f}, at first by {first/val/score_length_corr:.2f}, and "
        "responses have {val/response_length:.1f} tokens, at first {first/val/response_length:.1f}: the reward model "
        "may be paying for length",
        patience=3,
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
        ("policy/entropy_avg", "first/policy/entropy_avg"),
        lambda m: m["policy/entropy_avg"] < 0.1 * m["first/policy/entropy_avg"],
        "entropy is {policy/entropy_avg:.3g}, it was {first/policy/entropy_avg:.3g} at the start: the policy has "
        "stopped exploring; raise kl.coef or entropy_coef",
    ),
    Rule(
        "diversity_falls",
        ("samples/distinct_2", "first/samples/distinct_2"),
        lambda m: m["samples/distinct_2"] < 0.5 * m["first/samples/distinct_2"],
        "{samples/distinct_2:.0%} of token pairs in the responses are different, at first it was "
        "{first/samples/distinct_2:.0%}: responses are becoming alike; raise kl.coef or stop earlier",
        patience=2,
    ),
    Rule(
        "ensemble_disagrees",
        ("reward/disagreement", "first/reward/disagreement", "objective/scores", "first/objective/scores"),
        lambda m: (
            m["reward/disagreement"] > 2 * m["first/reward/disagreement"]
            and m["objective/scores"] > m["first/objective/scores"]
        ),
        "the reward models differ by {reward/disagreement:.3g} on the responses, at first by "
        "{first/reward/disagreement:.3g}, while the score rises: it rises where they were not trained; use combine: "
        "min, raise kl.coef or stop earlier",
        patience=2,
    ),
    Rule(
        "cutting_pays",
        ("val/cut_rank", "val/eos_rate"),
        lambda m: m["val/cut_rank"] > 0.5 and m["val/eos_rate"] < 0.95,
        "responses that were cut score better than {val/cut_rank:.0%} of those that end: is the reward normalised? "
        "Lower missing_eos.value, or the policy will learn not to end",
    ),
    Rule(
        "value_clip_lags",
        ("val/return_var", "clip_value"),
        lambda m: m["val/return_var"] ** 0.5 > 5 * m["clip_value"],
        "returns have a standard deviation above five times clip.value {clip_value:g}, and the critic moves by at "
        "most that much per rollout: normalise the reward, or set clip.value: null",
        patience=5,
    ),
    Rule(
        "engine_differs",
        ("samples/mismatch_kl",),
        lambda m: m["samples/mismatch_kl"] > 0.01,
        "the engine's log-probabilities differ from the trainer's by a KL of {samples/mismatch_kl:.3g} per token: "
        "stale weights, another precision or another temperature in the engine",
    ),
)


def check(metrics: Metrics, history: History, facts: Metrics) -> tuple[list[Alarm], History]:
    """The alarms that a rollout's metrics raise, and the history for the next rollout.

    `facts` are numbers of the run that rules need: max_response_tokens, clip_value, max_training_score.
    """
    measured = {name: metrics[name] for name in REMEMBERED if math.isfinite(metrics.get(name, math.nan))}
    first = {**measured, **history.first}
    known = {**metrics, **facts, **{f"first/{name}": value for name, value in first.items()}}
    alarms, streaks = [], {}
    for rule in RULES:
        if any(name not in known for name in rule.needs) or not rule.holds(known):
            continue
        streaks[rule.name] = history.streaks.get(rule.name, 0) + 1
        if streaks[rule.name] == rule.patience:
            alarms.append(Alarm(rule.name, rule.message.format_map(known), rule.fatal))
    return alarms, History(streaks, first)


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
            "(adapter, precision, temperature), and is dropout off?"
        )
