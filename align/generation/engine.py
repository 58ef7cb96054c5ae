"""The rollout interface. An engine samples from the policy's own distribution: no top-k, no top-p, no penalties.

Truncated or penalised sampling is not the policy; the KL estimate would turn negative and PPO would be off-policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import torch

from align.errors import ConfigError


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

    @classmethod
    def of(
        cls,
        ids: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        finished: Sequence[bool],
        pad_id: int,
    ) -> Samples:
        """From lists, one for each response."""
        lengths = torch.tensor([len(row) for row in ids], dtype=torch.long)
        tokens, chosen = right_pad(ids, pad_id, torch.long), right_pad(logprobs, 0.0, torch.float32)
        return cls(tokens, lengths, torch.tensor(finished, dtype=torch.bool), chosen)

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


def request_seed(seed: int, number: int) -> int:
    """A seed for each request: far apart, because vLLM counts on from it for further samples of one prompt."""
    return int.from_bytes(blake2b(f"{seed} {number}".encode(), digest_size=7).digest())


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, P) and attention mask (B, P) of prompts padded on the left, so that responses start in one column."""
    width = max(map(len, rows), default=1)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(list(row))
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def right_pad(rows: Sequence[Sequence[Any]], fill: Any, dtype: torch.dtype) -> torch.Tensor:
    """(B,T) of rows that are filled up on the right; (0,1) of none."""
    width = max(map(len, rows), default=1)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype).view(len(rows), width)
