"""What the policy-gradient stages do with memory, for `align plan --memory`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.job import Input
from align.pipeline.estimate.activations import Pass
from align.pipeline.estimate.workload import Held, Lengths, Sampling, Step, Workload, evaluation_sampling
from stages.ppo.config import Config
from stages.ppo.layout import Layout, layout

BUCKET = 2**24
"""Gradients that are added up over the processes at a time (align.training.optimisers)."""


def workload(
    config: Config, inputs: Mapping[str, Input], lengths: Lengths, processes: int, evaluation: Mapping[str, Any]
) -> Workload:
    """The models of the layout; the actor's pass and, if it has its own states, the critic's."""
    roles = layout(config, inputs)
    prompt, response = lengths.longest(config.max_prompt_tokens, (0,)), config.rollout.max_response_tokens
    rows = min(config.micro_batch_size, max(1, config.responses // config.minibatches // processes))
    if config.micro_batch_tokens is not None:
        rows = max(1, min(rows, config.micro_batch_tokens // (prompt + response)))
    one = Pass(rows, prompt + response, packed=True, recomputes=config.gradient_checkpointing)
    again = config.responses // config.minibatches > rows * processes
    steps = [Step("actor", one, "ppo", rows * response, accumulates=again or config.ptx is not None)]
    if roles.critic in {"separate", "adapter"}:
        steps.append(Step("critic", one, "none", accumulates=again))
    optimiser_steps = config.rollouts * config.epochs * config.minibatches
    return Workload(
        _models(config, roles),
        steps,
        [_rollout(config, prompt + response, processes), evaluation_sampling(evaluation, prompt)],
        optimiser_steps,
        config.rollouts * config.responses * response,
        config.checkpoint.keep,
        bucket=BUCKET,
    )


def _models(config: Config, roles: Layout) -> list[Held]:
    trained = "adapter" if config.lora else "all"
    actor, critic = ("all" if optim.is_8bit else "none" for optim in (config.optim, config.critic.optim))
    adapters = [Held(name, name, is_adapter=True, lora=config.lora) for name in roles.adapter_rewards]
    models = [Held("actor", "policy", trained, lora=config.lora, is_rounded=bool(config.lora), moments_8bit=actor)]
    if roles.critic == "adapter":
        models.append(Held("critic", "policy", "adapter", lora=config.lora, is_adapter=True, moments_8bit=critic))
    models += adapters if roles.trains_adapter else []
    if not roles.reference_is_base:
        models.append(Held("reference", "reference", offloaded="reference" in config.offload))
        models += [] if roles.trains_adapter else adapters
    if roles.critic == "separate":
        models.append(Held("critic", "policy", "all", has_head=False, moments_8bit=critic))
    return models + [
        Held(", ".join(names), names[0], has_head=False, offloaded="reward" in config.offload)
        for names in roles.own_rewards
    ]


def _rollout(config: Config, width: int, processes: int) -> Sampling:
    """Where the engine is `auto`, transformers is assumed: of the two it keeps fewer sequences at a time."""
    rollout, responses = config.rollout, max(1, config.responses // processes)
    if rollout.engine in {"vllm", "vllm-server"}:
        rows = min(rollout.max_sequences, responses)
        return Sampling(rows, width, True, rollout.kv_cache_bytes, rollout.gpu_memory)
    return Sampling(min(rollout.micro_batch_size, responses), width)
