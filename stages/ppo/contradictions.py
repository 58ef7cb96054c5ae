"""Settings of `ppo`, `rloo` and `grpo` that contradict each other, or would do nothing. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import TYPE_CHECKING

from align.recipe.training_settings import dropout_problems
from align.rewards.settings import DEFAULT_TERM

if TYPE_CHECKING:
    from stages.ppo.config import Config

VALUED_RULES = ("replace", "subtract")

TERM_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


def contradictions(config: Config, inputs: Container[str]) -> dict[str, str]:
    """What is wrong, by the key of a setting. `inputs` are the names that no term of the reward may have."""
    problems = _size_problems(config) | _rollout_problems(config) | _tail_problems(config) | _kl_problems(config)
    problems |= _reward_problems(config, inputs)
    problems |= _critic_problems(config) if config.has_critic else _critic_free_problems(config)
    return problems | _idle_problems(config)


def _size_problems(config: Config) -> dict[str, str]:
    problems = dropout_problems(config.lora)
    if config.responses % config.minibatches:
        problems["minibatches"] = f"{config.responses} responses per rollout are not a multiple of {config.minibatches}"
    if config.overlong is not None and config.overlong.buffer > config.rollout.max_response_tokens:
        problems["overlong.buffer"] = (
            f"{config.overlong.buffer} is over rollout.max_response_tokens {config.rollout.max_response_tokens}"
        )
    return problems


def _rollout_problems(config: Config) -> dict[str, str]:
    rollout, problems = config.rollout, {}
    if rollout.overlap and rollout.engine != "vllm-server":
        problems["rollout.overlap"] = (
            f"needs rollout.engine: vllm-server; {rollout.engine} samples in the trainer's process, on weights "
            "that change while it learns"
        )
    if rollout.correction == "off" and (rollout.overlap or rollout.round_tokens is not None):
        problems["rollout.correction"] = (
            "off would learn from older policies' tokens as if they were the policy's own; use token, or leave "
            "rollout.round_tokens and rollout.overlap out"
        )
    return problems


def _tail_problems(config: Config) -> dict[str, str]:
    rollout = config.rollout
    most, each = rollout.max_response_tokens, rollout.round_tokens
    if each is None:
        idle = {
            "rollout.max_staleness": rollout.max_staleness is not None,
            "rollout.until_ended": rollout.until_ended,
        }
        return {name: "has no effect without rollout.round_tokens" for name, is_set in idle.items() if is_set}
    if each >= most or most % each:
        what = f"rollout.max_response_tokens {most} is not two or more times {each}; choose a part of it"
        return {"rollout.round_tokens": what}
    problems = {}
    if rollout.max_staleness is not None and rollout.max_staleness >= most // each - 1:
        problems["rollout.max_staleness"] = (
            f"has no effect: all responses end within {most // each} rollouts, so the oldest token is at most "
            f"{most // each - 1} old; choose a smaller number, or leave it out"
        )
    if rollout.until_ended == 1:
        problems["rollout.until_ended"] = (
            "1 waits for every response, so that none is carried over; choose a smaller share, or leave "
            "rollout.round_tokens out"
        )
    return problems


def _kl_problems(config: Config) -> dict[str, str]:
    problems = {}
    if config.kl.target is not None and config.kl.coef == 0:
        problems["kl.target"] = "moves kl.coef by a factor, and that of 0 stays 0; give kl.coef a start"
    waits = config.compares and config.rollout.round_tokens is not None
    most = config.responses * (config.rollout.responses_per_prompt if waits else 1)  # whose groups may end at once
    if config.kl.target is not None and most >= 5 * config.kl.horizon:
        problems["kl.horizon"] = f"{most} responses per rollout need one above {most // 5}"
    if config.kl.estimator == "k2" and config.whiten_advantages:
        problems["kl.estimator"] = (
            "whitening divides the scores by their spread and not a KL in the loss, so kl.coef would mean another "
            "thing at every rollout; set whiten_advantages: false"
        )
    return problems


def _critic_problems(config: Config) -> dict[str, str]:
    problems = {}
    if config.critic.kind == "adapter" and config.lora is None:
        problems["critic.kind"] = "adapter needs `lora`; without it the critic is separate or a shared-head"
    if (config.critic.warmup_rollouts or 0) >= config.rollouts:
        problems["critic.warmup_rollouts"] = f"the policy would never be trained: there are {config.rollouts} rollouts"
    return problems


def _critic_free_problems(config: Config) -> dict[str, str]:
    fields = {"critic", "lam", "lam_value", "lam_length", "clip.value"}
    fields |= set() if config.estimator == "reinforce++" else {"gamma"}
    what = f"a setting of the estimator gae; {config.estimator} has no critic"
    if config.kind == "ppo":
        what += (
            f" (the stage `{config.estimator}` has its own defaults)" if config.estimator in {"rloo", "grpo"} else ""
        )
    problems = dict.fromkeys((name for name in sorted(fields) if config.is_changed(name)), what)
    if config.missing_eos.rule == "bootstrap":
        problems["missing_eos.rule"] = f"bootstrap needs a critic; {config.estimator} has none"
    if config.compares and config.rollout.responses_per_prompt < 2:
        problems["rollout.responses_per_prompt"] = (
            f"{config.estimator} compares the responses to one prompt; set it to 2 or more"
        )
    return problems


def _idle_problems(config: Config) -> dict[str, str]:
    """Settings that were changed and would do nothing."""
    needs = {
        "divide_by_std": ("estimator: grpo", config.estimator == "grpo"),
        "critic.coef": ("critic.kind: shared-head", not config.has_critic or config.critic.kind == "shared-head"),
        "kl.horizon": ("kl.target", config.kl.target is not None),
        "missing_eos.value": ("missing_eos.rule: replace or subtract", config.missing_eos.rule in VALUED_RULES),
    }
    return {
        name: f"has no effect without {other}"
        for name, (other, works) in needs.items()
        if not works and config.is_changed(name)
    }


def _reward_problems(config: Config, inputs: Container[str]) -> dict[str, str]:
    if not config.reward:
        return {"reward": "no term, so there is nothing to maximise"}
    problems = {}
    for name in config.reward:
        if name in inputs and name != DEFAULT_TERM:
            problems[f"reward.{name}"] = "the name of another input; choose another"
        elif not TERM_NAME.fullmatch(name):
            problems[f"reward.{name}"] = "the name of a term is made of letters, digits, - and _"
    return problems
