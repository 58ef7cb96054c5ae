"""How good a policy is, on prompts no stage trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from align.data.render import Renderer
from align.data.rows import Message, Prompt
from align.errors import ConfigError
from align.evaluation.likelihood import response_logprob_sums
from align.evaluation.statistics import mean_interval, share_interval
from align.generation.engine import RolloutEngine, Samples, Sampling
from align.models.roles import Role
from align.recipe.engine_settings import EvaluationSettings
from align.rewards.functions import imported

GoldScorer = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
RewardScorer = Callable[[Sequence[Sequence[Message]], Sequence[list[int]], Samples], torch.Tensor]
"""Scores (B,) of responses, given the prompts as messages and as ids."""


def load_gold(name: str | None) -> GoldScorer | None:
    """The scorer named `module:function`. Raises ConfigError when it cannot be imported; called, when it raises or does
    not give a score for each response: it is the user's code."""
    if name is None:
        return None
    scorer = imported(name, "evaluation.gold")

    def gold(questions: Sequence[str], texts: Sequence[str]) -> list[float]:
        try:
            scores = [float(score) for score in scorer(questions, texts)]
        except Exception as error:
            raise ConfigError(f"evaluation.gold: {name} raised {type(error).__name__}: {error}") from error
        if len(scores) != len(texts):
            raise ConfigError(f"evaluation.gold: {name} gave {len(scores)} scores for {len(texts)} responses")
        return scores

    return gold


def response_sampling(settings: EvaluationSettings, renderer: Renderer, seed: int) -> Sampling:
    """How a policy is sampled when it is measured: from its own distribution."""
    return Sampling(settings.max_response_tokens, 1.0, renderer.stop_ids, renderer.pad_id, seed)


def evaluate_policy(
    engine: RolloutEngine,
    policy: Role,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    *,
    seed: int,
    reference: Role | None = None,
    scorer: RewardScorer | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Samples one response per held-out prompt at temperature 1 and measures it. `engine` samples from `policy`, which
    may share its weights with `reference`.

    Returns final metrics (gold, kl, reward, eos_rate, response_length, each with its 95 % interval) and the samples.
    kl is E[sum_t log pi - log ref] over the policy's own samples, in nats per response.
    """
    prompts = prompts[: settings.prompts]
    ids = [renderer.prompt(prompt.messages, prompt.source) for prompt in prompts]
    samples = engine.generate(ids, response_sampling(settings, renderer, seed))
    engine.rest()
    texts = [renderer.decode(row) for row in samples.rows()]
    questions = [prompt.messages[-1]["content"] for prompt in prompts]

    metrics: dict[str, Any] = {"prompts": len(prompts)}
    rows: list[dict[str, Any]] = [
        {"prompt": question, "response": text, "finished": finished}
        for question, text, finished in zip(questions, texts, samples.finished.tolist(), strict=True)
    ]
    gold = load_gold(settings.gold)
    if gold is not None:
        scores = gold(questions, texts)
        metrics["gold"], metrics["gold_ci95"] = mean_interval(scores)
        for row, score in zip(rows, scores, strict=True):
            row["gold"] = score
    if reference is not None:
        arguments = (ids, samples.rows(), renderer.pad_id, settings.batch_size)
        ours, theirs = response_logprob_sums(policy, *arguments), response_logprob_sums(reference, *arguments)
        kl = [a - b for a, b in zip(ours, theirs, strict=True)]
        metrics["kl"], metrics["kl_ci95"] = mean_interval(kl)
        for row, value in zip(rows, kl, strict=True):
            row["kl"] = value
    if scorer is not None:
        rewards = scorer([prompt.messages for prompt in prompts], ids, samples).tolist()
        metrics["reward"], metrics["reward_ci95"] = mean_interval(rewards)
        for row, value in zip(rows, rewards, strict=True):
            row["reward"] = value
    metrics["eos_rate"], metrics["eos_rate_ci95"] = share_interval(int(samples.finished.sum()), len(prompts))
    lengths = [float(length) for length in samples.lengths.tolist()]
    metrics["response_length"], metrics["response_length_ci95"] = mean_interval(lengths)
    return metrics, rows
