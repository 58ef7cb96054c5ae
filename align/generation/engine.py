"""The rollout interface. An engine samples from the policy's own distribution: no top-k, no top-p, no penalties.

Truncated or penalised sampling is not the policy; the KL estimate would turn negative and PPO would be off-policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


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
    """What PPO and evaluation sample with."""

    name: str

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        """One response per prompt, in the order of the prompts."""
        ...

    def sync(self) -> None:
        """Makes the engine sample from the policy's current weights."""
        ...


def cut_at_stop(token_ids: torch.Tensor, stop_ids: Sequence[int], pad_id: int) -> Samples:
    """Samples from raw response ids (B, T): everything after the first stop token becomes PAD."""
    is_stop = torch.isin(token_ids, torch.tensor(stop_ids, device=token_ids.device))
    finished = is_stop.any(1)
    first = torch.where(finished, is_stop.long().argmax(1), token_ids.shape[1] - 1)
    lengths = first + 1
    width = int(lengths.max())
    keep = torch.arange(width, device=token_ids.device) < lengths[:, None]
    return Samples(torch.where(keep, token_ids[:, :width], pad_id), lengths, finished)


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
