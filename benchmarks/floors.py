"""What a rollout of PPO must cost at least: multiplications at peak speed, or bytes at full bandwidth.

A floor counts what the algorithm needs and nothing that an implementation adds: no padding, no recomputation, causal
attention over the tokens there are. A product of a (m,k) and a (k,n) matrix is 2mkn operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ADAMW_NUMBERS = 7
"""Read and written per parameter and step: weight and both moments twice, the gradient once."""
GEMM_SIZE = 1024
READ_NUMBERS = 64 * 2**20
CALIBRATION_SECONDS = 0.5


@dataclass(frozen=True)
class Machine:
    """Operations and bytes per second."""

    operations: float
    bandwidth: float

    def seconds(self, operations: float, bytes_moved: float = 0.0) -> float:
        """The later of the two."""
        return max(operations / self.operations, bytes_moved / self.bandwidth)


@dataclass(frozen=True)
class Shape:
    """A dense decoder of the Llama family with tied or untied embeddings."""

    layers: int
    hidden: int
    inner: int
    query: int
    key_value: int
    vocabulary: int
    number_bytes: int = 4

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From a model's config.json."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head = config.get("head_dim") or hidden // heads
        return cls(
            config["num_hidden_layers"],
            hidden,
            config["intermediate_size"],
            heads * head,
            (config.get("num_key_value_heads") or heads) * head,
            config["vocab_size"],
        )

    @property
    def body(self) -> int:
        """Weights that every token is multiplied by."""
        attention = self.hidden * (self.query + 2 * self.key_value) + self.query * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        """Weights of the output embedding."""
        return self.hidden * self.vocabulary

    def forward(self, length: float, predicted: float = 0.0) -> float:
        """Operations of one pass over a sequence, with logits at `predicted` of its tokens."""
        attention = 2 * self.layers * self.query * length * (length + 1)
        return 2 * self.body * length + attention + 2 * self.head * predicted

    def decode(self, context: float) -> float:
        """Operations of one more token that attends to `context` tokens, itself included."""
        return 2 * (self.body + self.head) + 4 * self.layers * self.query * context

    def decode_bytes(self, contexts: Sequence[float]) -> float:
        """Bytes read for one more token of each row: all weights once, and every row's keys and values."""
        cache = 2 * self.layers * self.key_value * sum(contexts)
        return self.number_bytes * (self.body + self.head + cache)


@dataclass(frozen=True)
class Work:
    """A rollout: `rows` responses of `response` tokens to prompts of `prompt` tokens, on average; optimiser steps.

    Equal lengths are the cheapest way to have these averages: attention grows with the square of the length."""

    rows: int
    prompt: float
    response: float
    epochs: int
    minibatches: int


def floors(shape: Shape, machine: Machine, work: Work) -> dict[str, float]:
    """Seconds of each phase: actor, reference, critic and reward model of one shape, all weights trained."""
    length = work.prompt + work.response
    with_logits, without = (work.rows * shape.forward(length, predicted) for predicted in (work.response, 0))
    passes = 3 * work.epochs * (with_logits + without)  # a backward pass costs two forward passes
    updates = 2 * work.epochs * work.minibatches * ADAMW_NUMBERS * shape.number_bytes * (shape.body + shape.head)
    return {
        "rollout": rollout_floor(shape, machine, [work.prompt] * work.rows, [work.response] * work.rows),
        "score": machine.seconds(without),
        "observe": machine.seconds(2 * with_logits + without),
        "learn": machine.seconds(passes) + machine.seconds(0, updates),
        "sync": 0.0,
    }


def rollout_floor(shape: Shape, machine: Machine, prompts: Sequence[float], responses: Sequence[float]) -> float:
    """Seconds of reading prompts of these lengths, which gives each first token, and of the tokens after it, one by
    one: at each step for the rows alone whose response goes on."""
    total = machine.seconds(sum(shape.forward(length, 1) for length in prompts))
    for step in range(1, int(max(responses))):
        contexts = [prompt + step for prompt, length in zip(prompts, responses, strict=True) if int(length) > step]
        operations = sum(shape.decode(context) for context in contexts)
        total += machine.seconds(operations, shape.decode_bytes(contexts))
    return total


def calibrate() -> Machine:
    """What this machine reaches with torch's current threads: a large product of matrices, a sum over main memory."""
    left, right = torch.rand(2, GEMM_SIZE, GEMM_SIZE).unbind()
    numbers = torch.ones(READ_NUMBERS)
    product, read = fastest(lambda: left @ right), fastest(numbers.sum)
    return Machine(2 * GEMM_SIZE**3 / product, numbers.nbytes / read)


def fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls."""
    call()
    best, until = float("inf"), time.perf_counter() + CALIBRATION_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best
