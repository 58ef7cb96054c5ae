"""What a stage does with memory: the models it holds, and its largest passes. Each stage says it of itself
(`StageSpec.workload`), torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.pipeline.estimate.activations import Pass
from align.recipe.training_settings import LoraSettings, OptimSettings, TrainingSettings


@dataclass(frozen=True)
class Lengths:
    """Tokens of a stage's rows."""

    rows: int | None = None
    """Training rows; None: unknown."""
    sampled: Sequence[Sequence[int]] = ()
    """Tokens of each part of some of them; empty: unknown."""

    def longest(self, most: int, *parts: Sequence[int]) -> int:
        """The longest of the sampled rows that have at most `most` tokens; `most` where nothing is known. Each of
        `parts` are the numbers of the parts that make a sequence; none: all."""
        kept = [length for length in self.sequences(*parts) if length <= most]
        return max(kept, default=most)

    def sequences(self, *parts: Sequence[int]) -> list[int]:
        """Tokens of all sequences of the sampled rows."""
        chosen = parts or [range(len(self.sampled[0]))] if self.sampled else []
        return [sum(row[at] for at in one) for row in self.sampled for one in chosen]


@dataclass(frozen=True)
class Held:
    """A model in memory."""

    role: str
    source: str
    """The input whose shapes it has."""
    trained: Literal["all", "adapter", "head", "nothing"] = "nothing"
    has_head: bool = True
    """Whether it has an output head; a reward model and a critic have one number per token instead."""
    lora: LoraSettings | None = None
    is_adapter: bool = False
    """Whether it is only an adapter on the model before it in the list."""
    is_rounded: bool = False
    """Whether its frozen numbers are held in the dtype of the passes and not in float32."""
    moments_8bit: str = "none"
    """Of which trained numbers AdamW holds the moments in 8 bits: none, layers (transformers' trainer leaves the
    embedding out) or all."""
    offloaded: bool = False
    """Whether it waits in main memory between its passes."""


@dataclass(frozen=True)
class Step:
    """A forward and backward pass of one of the models."""

    role: str
    one: Pass
    logits: Literal["fused", "whole", "ppo", "none"]
    response_tokens: int = 0
    """Of ppo: tokens whose logits are needed."""
    accumulates: bool = False
    """Whether gradients of an earlier pass are in memory while this one computes."""


@dataclass(frozen=True)
class Sampling:
    """Responses sampled at a time, and the tokens of the longest with its prompt."""

    rows: int
    width: int
    on_vllm: bool = False
    cache_bytes: int | None = None
    """What vLLM's cache is given; None: what the rows need, or the share of a GPU in `gpu_share`."""
    gpu_share: float = 0.0


@dataclass(frozen=True)
class Workload:
    """All that decides a stage's memory, disk and length."""

    models: list[Held]
    steps: list[Step]
    samplings: list[Sampling]
    num_steps: int | None
    """Optimiser steps; None: unknown."""
    tokens: int | None
    """Tokens of all passes over the data, or sampled at most; None: unknown."""
    checkpoints: int
    """How many are kept."""
    reopened: str | None = None
    """Input that is opened once more after training: the reward stage samples from the policy it started from."""
    bucket: int | None = None
    """Gradients that are added up over the processes at a time, in a loop of our own; None: a trainer does all, in the
    way of its libraries. In such a loop, of models whose weights are divided only the first is ever made whole."""


def trained_model(config: TrainingSettings, optim: OptimSettings, *, has_head: bool = True) -> Held:
    """The model that a stage on TRL trains."""
    moments = "layers" if optim.is_8bit else "none"
    return Held("trained", "policy", "adapter" if config.lora else "all", has_head, config.lora, moments_8bit=moments)


def trl_workload(
    config: TrainingSettings,
    lengths: Lengths,
    processes: int,
    evaluation: Mapping[str, Any],
    *,
    models: list[Held],
    sequences_per_row: int,
    parts: Sequence[Sequence[int]],
    logits: Literal["fused", "none"],
    samplings: Sequence[Sampling] = (),
    reopened: str | None = None,
) -> Workload:
    """Of a stage on a TRL trainer: a micro-batch is padded to its longest row, and has `sequences_per_row` of them per
    row (a pair has two)."""
    per_process = max(1, config.batch_size // processes)
    micro = config.micro_batch_size or per_process
    width = lengths.longest(config.max_length, *parts)
    one = Pass(micro * sequences_per_row, width, recomputes=config.gradient_checkpointing)
    steps = config.max_steps
    if steps is None and lengths.rows is not None:
        steps = max(1, math.ceil(lengths.rows * config.epochs / config.batch_size))
    known = [length for length in lengths.sequences(*parts) if length <= config.max_length]
    per_row = sequences_per_row * sum(known) / len(known) if known else None
    return Workload(
        models,
        [Step("trained", one, logits, accumulates=per_process > micro)],
        [*samplings, evaluation_sampling(evaluation, width)],
        steps,
        round(steps * config.batch_size * per_row) if steps and per_row else None,
        config.checkpoint.keep,
        reopened,
    )


def evaluation_sampling(evaluation: Mapping[str, Any], width: int) -> Sampling:
    """The responses to held-out prompts at the end of a stage; a prompt is taken to be at most as long as `width`."""
    rows = min(evaluation["batch_size"], evaluation["prompts"])
    return Sampling(rows, width + evaluation["max_response_tokens"])
