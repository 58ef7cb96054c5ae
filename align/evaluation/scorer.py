"""Scores of sampled responses by one reward model, whoever's tokenizer it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.render import Renderer
from align.data.rows import Message
from align.generation.engine import Samples
from align.models.handover import tokenizer_identity
from align.models.opened import Opened
from align.models.reward import score_sequences
from align.models.roles import Role


@dataclass(frozen=True)
class RewardModel:
    """A reward model as PPO holds it: alone, or an adapter on a shared base."""

    role: Role
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer


def shares_tokenizer(reward: RewardModel, policy: Opened) -> bool:
    """Whether the reward model reads the very token ids that the policy writes."""
    ours = tokenizer_identity(policy.tokenizer, policy.renderer)
    return ours == tokenizer_identity(reward.tokenizer, reward.renderer)


class RewardScorer:
    """Scores by one reward model; with the policy's own tokenizer on its very token ids, else on re-rendered text."""

    def __init__(self, reward: RewardModel, policy: Opened, batch_size: int):
        self.reward, self.policy_renderer, self.batch_size = reward, policy.renderer, batch_size
        self.shares_tokenizer = shares_tokenizer(reward, policy)

    def check_prompts(self, prompts: Sequence[Sequence[Message]]) -> None:
        """Raises DataError now, not in the middle of a run, for a prompt the reward model's template cannot render."""
        if not self.shares_tokenizer:
            for messages in prompts:
                self.reward.renderer.prompt(messages)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Sequence[Message]], prompt_ids: Sequence[list[int]], samples: Samples
    ) -> Tensor:
        """Normalised scores (B,) float32, on the reward model's device."""
        sequences = [
            self._sequence(messages, ids, response, finished)
            for messages, ids, response, finished in zip(
                prompts, prompt_ids, samples.rows(), samples.finished.tolist(), strict=True
            )
        ]
        batches = [sequences[start : start + self.batch_size] for start in range(0, len(sequences), self.batch_size)]
        role, pad_id = self.reward.role, self.reward.renderer.pad_id
        with role.active():
            return torch.cat([score_sequences(role, batch, pad_id) for batch in batches])

    def _sequence(
        self, messages: Sequence[Message], prompt_ids: list[int], response: list[int], finished: bool
    ) -> list[int]:
        if self.shares_tokenizer:  # a cut response is closed: scores are read at the end-of-turn token
            return prompt_ids + response + ([] if finished else [self.policy_renderer.end_of_turn])
        renderer = self.reward.renderer
        text = renderer.without_control_text(self.policy_renderer.decode(response))
        return renderer.prompt(messages) + renderer.response(messages, text)
