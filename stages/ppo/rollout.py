"""One rollout: prompts, sampled responses, and everything PPO needs to know of each response token.

B rows, P prompt columns (left-padded), T response columns (right-padded). Every (B,T) tensor is indexed by *this*
response token; masks come from lengths, never from token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.data.rows import Message
from align.generation.engine import Samples, left_pad
from align.training.masked import length_mask


@dataclass(frozen=True)
class Question:
    """A training prompt: its messages, for a reward model with another template, and its token ids."""

    messages: Sequence[Message]
    ids: list[int]


@dataclass(frozen=True)
class Responses:
    """Sampled responses as one padded batch: input_ids and attention_mask (B,P+T), lengths and finished (B,)."""

    input_ids: Tensor
    attention_mask: Tensor
    lengths: Tensor
    finished: Tensor
    width: int
    """T."""

    @property
    def mask(self) -> Tensor:
        """(B,T) bool: the response's own tokens, its stop token included."""
        return length_mask(self.lengths, self.width)

    @property
    def prompt_lengths(self) -> Tensor:
        """(B,) tokens of each prompt."""
        return self.attention_mask[:, : -self.width].sum(1)

    @property
    def tokens(self) -> Tensor:
        """(B,T) the response columns of input_ids."""
        return self.input_ids[:, -self.width :]

    def rows(self, index: Tensor) -> Responses:
        """Some rows, without the padding columns that none of them uses: a matter of speed, never of results. Of no
        rows one column of each part is left."""
        lengths = self.lengths[index]
        unused = self.width - max(lengths.tolist(), default=1)
        attention = self.attention_mask[index]
        prompt_width = attention.shape[1] - self.width
        left = prompt_width - max(attention[:, :prompt_width].sum(1).tolist(), default=1)
        columns = slice(left, attention.shape[1] - unused)
        return Responses(
            self.input_ids[index, columns],
            attention[:, columns],
            lengths,
            self.finished[index],
            self.width - unused,
        )


def join(prompts: Sequence[Sequence[int]], samples: Samples, pad_id: int, device: torch.device | str) -> Responses:
    """Prompts and their sampled responses as one batch."""
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)
    lengths = samples.lengths.to(device)
    width = samples.token_ids.shape[1]
    valid = length_mask(lengths, width)
    return Responses(
        input_ids=torch.cat([prompt_ids, samples.token_ids.to(device)], 1),
        attention_mask=torch.cat([prompt_mask, valid.long()], 1),
        lengths=lengths,
        finished=samples.finished.to(device),
        width=width,
    )


@dataclass(frozen=True)
class Rollout:
    """Responses with what the models said of them before the first update; all (B,T) float32 unless noted."""

    responses: Responses
    scores: Tensor
    """(B,) after score clip, overlong penalty and missing-EOS rule; the sum over a row of process rewards."""
    counted: Tensor
    """(B,) bool: rows that are learned from. All, unless cut responses are left out."""
    logp_old: Tensor
    logp_ref: Tensor
    entropy: Tensor
    rewards: Tensor
    """Token scores less the KL penalty, where that is part of the reward."""
    advantages: Tensor
    """As the policy loss uses them: whitened if the settings say so, 0 where nothing is learned."""
    values: Tensor | None
    """None without a critic."""
    returns: Tensor | None
    """Targets of the critic: advantages before whitening, plus values."""
    weights: Tensor | None = None
    """Of tokens that an older policy sampled, in whatever is an expectation over the policy's own; advantages have them
    already. None: there are none."""

    @property
    def learned(self) -> Tensor:
        """(B,T) bool: the tokens that losses are summed over."""
        return self.responses.mask & self.counted[:, None]
