"""The end of every policy stage: measure it on held-out prompts and leave samples behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from align.context import Context
from align.data.load import load
from align.data.render import Renderer
from align.data.rows import Prompt
from align.data.split import Place, places
from align.errors import DataError, Problem
from align.evaluation.policy import RewardScorer, evaluate_policy, response_sampling
from align.generation.engine import RolloutEngine
from align.generation.open import Sampled, open_engine
from align.generation.transformers_engine import TransformersEngine
from align.models import roles
from align.recipe.data_settings import Role
from align.recipe.engine_settings import EvaluationSettings
from align.training.parity import NUM_PROBES, ParityGuard

FINAL = "final"
NUM_SHOWN = 4
"""Prompts sampled at fixed steps of the training."""


def held_out_prompts(
    settings: EvaluationSettings, own: Sequence[Prompt], training: Iterable[Place] = ()
) -> Sequence[Prompt]:
    """The prompts to measure on: `evaluation.data` if the recipe names it, else the stage's own held-out prompts.

    Raises DataError when one of them is a training prompt.
    """
    prompts = own
    if settings.data is not None:
        prompts = load(settings.data.model_copy(update={"held_out": 0.0}), Role.PROMPTS).train
    measured = list(places(prompts))
    keys = {place.key for place in measured}
    seen = {place.key: place.source for place in training if place.key in keys}
    leaks = [(place.source, seen[place.key]) for place in measured if place.key in seen]
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


def evaluate_model(
    context: Context,
    settings: EvaluationSettings,
    model: Any,
    folder: Path,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    reference: roles.Role | None = None,
) -> dict[str, Any]:
    """`evaluate_stage` of a model in memory, whose config is in `folder`, sampled by the engine of the settings, which
    is held against the model first.

    Raises ConfigError when that engine cannot run it, RolloutError when it gives up or is not the model.
    """
    if not prompts:
        return {}
    policy = roles.causal_role(model)
    ids = [renderer.prompt(prompt.messages, prompt.source) for prompt in prompts[: settings.prompts]]
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    console = Console(stderr=True, highlight=False, quiet=not context.is_main)
    engine = open_engine(
        settings,
        Sampled(model, folder, dtype, max(map(len, ids)) + settings.max_response_tokens, settings.batch_size),
        notice=lambda text: console.print(f"  evaluation: {escape(text)}"),
        log=context.directory / "vllm.log",
        end=context.abort,
    )
    with closing(engine):
        sampling = response_sampling(settings, renderer, context.seed("parity"))
        ParityGuard(engine, policy, ids[:NUM_PROBES], sampling, dtype).check()
        return evaluate_stage(context, settings, engine, policy, renderer, prompts, reference)


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
