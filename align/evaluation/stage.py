"""The end of every policy stage: measure it on held-out prompts and leave samples behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from align.context import Context
from align.data.load import load
from align.data.render import Renderer
from align.data.rows import Prompt
from align.data.split import prompt_key
from align.errors import DataError, Problem
from align.evaluation.policy import RewardScorer, evaluate_policy
from align.generation.engine import RolloutEngine
from align.generation.transformers_engine import TransformersEngine
from align.models import roles
from align.recipe.settings import EvaluationSettings, Role

FINAL = "final"
NUM_SHOWN = 4
"""Prompts sampled at fixed steps of the training."""


def held_out_prompts(
    settings: EvaluationSettings, own: Sequence[Prompt], training: Sequence[Prompt] = ()
) -> Sequence[Prompt]:
    """The prompts to measure on: `evaluation.data` if the recipe names it, else the stage's own held-out prompts.

    Raises DataError when one of them is a training prompt.
    """
    prompts = own
    if settings.data is not None:
        prompts = load(settings.data.model_copy(update={"held_out": 0.0}), Role.PROMPTS).train
    seen = {prompt_key(prompt.messages): prompt.source for prompt in training}
    keyed = [(prompt.source, prompt_key(prompt.messages)) for prompt in prompts]
    leaks = [(source, seen[key]) for source, key in keyed if key in seen]
    if leaks:
        fix = "remove one" if settings.data is not None else "give both files the same `held_out`"
        raise DataError(
            [
                Problem(place, f"this evaluation prompt is also trained on, at {other}", fix)
                for place, other in leaks[:20]
            ]
        )
    return prompts


def evaluate_stage(
    context: Context,
    settings: EvaluationSettings,
    engine: RolloutEngine,
    policy: roles.Role,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    reference: roles.Role | None = None,
    scorer: RewardScorer | None = None,
) -> dict[str, Any]:
    """Final metrics of a policy, from which `engine` samples; its samples go to samples.jsonl. No held-out prompts: no
    metrics. With adapters on a shared base call it before they are merged."""
    if not prompts:
        return {}
    metrics, rows = evaluate_policy(
        engine,
        policy,
        renderer,
        prompts,
        settings,
        seed=context.seed("evaluation"),
        reference=reference,
        scorer=scorer,
    )
    for row in rows:
        context.samples.write(context.metrics.last_step(), **{"at": FINAL, **row})
    return metrics


def sampler(
    context: Context,
    settings: EvaluationSettings,
    model: Any,
    renderer: Renderer,
    prompts: Sequence[Prompt],
) -> Callable[[int], None]:
    """A function that writes responses to the same few held-out prompts to samples.jsonl at a step of the training."""

    def sample(step: int) -> None:
        if not prompts:
            return
        few = settings.model_copy(update={"prompts": NUM_SHOWN})
        engine = TransformersEngine(model, NUM_SHOWN)
        _, rows = evaluate_policy(
            engine, roles.causal_role(model), renderer, prompts, few, seed=context.seed("samples")
        )
        for row in rows:
            context.samples.write(step, at="training", **row)

    return sample
