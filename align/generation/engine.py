"""The rollout interface. An engine samples from the policy's own distribution: no top-k, no top-p, no penalties.

Truncated or penalised sampling is not the policy; the KL estimate would turn negative and PPO would be off-policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from typing import Any, Protocol

import torch

from align.errors import ConfigError

CACHE_BLOCK = 128
"""Tokens for which vLLM reserves memory at a time on a CPU; fewer on a GPU."""

PROMPT_TOKENS = 4096
"""Tokens of prompts that vLLM reads in a step on a CPU."""


class CannotRun(ConfigError):
    """This engine cannot hold the model; another one may."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. `seed` makes a call repeatable."""

    max_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    pad_id: int
    seed: int


@dataclass(frozen=True)
class Samples:
    """Responses of B prompts, T the longest of them.

    token_ids (B, T) int64 right-padded; lengths (B,) int64 count valid tokens including the stop token; finished (B,)
    bool says that a stop token was produced, which the width can never tell.
    """

    token_ids: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor
    logprobs: torch.Tensor | None = None
    """(B, T) float32: the engine's own log-probabilities of the tokens, where it gives them."""

    def rows(self) -> list[list[int]]:
        """The valid ids of each response."""
        return [ids[:length].tolist() for ids, length in zip(self.token_ids, self.lengths.tolist(), strict=True)]


class RolloutEngine(Protocol):
    """What PPO, evaluation and `align generate` sample with."""

    name: str
    independent: bool
    """Whether it computes with code or weights of its own, so that it has to be compared with the policy."""

    @property
    def summary(self) -> str:
        """How the policy's weights reach it."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        """One response per prompt, in the order of the prompts; an equal prompt several times for several responses.
        Raises RolloutError when the engine gives up."""
        ...

    def sync(self) -> None:
        """Makes the engine sample from the policy's current weights. Raises RolloutError when the engine gives up."""
        ...

    def rest(self) -> None:
        """Gives up memory that it needs for sampling only, until `generate` or `sync` is called."""
        ...

    def differing(self) -> list[str]:
        """The names of weights that it holds otherwise than the policy; empty also where it cannot tell."""
        ...

    def close(self) -> None:
        """Frees what it holds. The policy keeps its weights."""
        ...


def group_repeats(prompts: Sequence[Sequence[int]]) -> list[tuple[Sequence[int], int]]:
    """Each run of equal prompts as one of them and how many there are."""
    return [(ids, len(list(run))) for ids, run in groupby(prompts)]


def cache_bytes(config: Any, dtype: torch.dtype, max_length: int, max_sequences: int) -> int:
    """Bytes of keys and values of so many sequences: 2 x layers x key-value heads x their size for each token, and
    memory for whole blocks of tokens."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = -(-max_length // CACHE_BLOCK) * CACHE_BLOCK * max_sequences
    return tokens * 2 * text.num_hidden_layers * heads * size * dtype.itemsize


def cpu_options(max_length: int) -> dict[str, Any]:
    """What vLLM is told on a CPU. Compiling a model takes half a minute. And prompts are read whole: for one that is
    read in parts vLLM rewinds the request's random generator, which only CUDA's can."""
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_length, PROMPT_TOKENS),
    }


def request_seed(seed: int, number: int) -> int:
    """A seed for each request: far apart, because vLLM counts on from it for further samples of one prompt."""
    return int.from_bytes(blake2b(f"{seed} {number}".encode(), digest_size=7).digest())


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, P) and attention mask (B, P) of prompts padded on the left, so that responses start in one column."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(list(row))
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)
