"""Scores of sampled responses by a reward model, which may have another tokenizer and template than the policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from align.data.render import Renderer
from align.data.rows import Message
from align.generation.engine import Samples
from align.models.handover import tokenizer_identity
from align.models.opened import Opened
from align.models.reward import score_sequences


class RewardScorer:
    """Scores responses; with the policy's own tokenizer on its very token ids, else on re-rendered text."""

    def __init__(self, reward: Opened, policy: Opened, batch_size: int):
        self.reward = reward
        self.policy_renderer: Renderer = policy.renderer
        self.batch_size = batch_size
        ours = tokenizer_identity(policy.tokenizer, policy.renderer)
        theirs = tokenizer_identity(reward.tokenizer, reward.renderer)
        self.shares_tokenizer = ours == theirs
        reward.model.eval().requires_grad_(False)

    def check_prompts(self, prompts: Sequence[Sequence[Message]]) -> None:
        """Raises DataError now, not in the middle of a run, for a prompt the reward model's template cannot render."""
        if not self.shares_tokenizer:
            for messages in prompts:
                self.reward.renderer.prompt(messages)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Sequence[Message]], prompt_ids: Sequence[list[int]], samples: Samples
    ) -> torch.Tensor:
        """Normalised scores (B,) float32, on the reward model's device."""
        sequences = [
            self._sequence(messages, ids, response, finished)
            for messages, ids, response, finished in zip(
                prompts, prompt_ids, samples.rows(), samples.finished.tolist(), strict=True
            )
        ]
        batches = [sequences[start : start + self.batch_size] for start in range(0, len(sequences), self.batch_size)]
        model, pad_id = self.reward.model, self.reward.renderer.pad_id
        return torch.cat([score_sequences(model, batch, pad_id) for batch in batches])

    def _sequence(
        self, messages: Sequence[Message], prompt_ids: list[int], response: list[int], finished: bool
    ) -> list[int]:
        if self.shares_tokenizer:  # a cut response is closed: scores are read at the end-of-turn token
            return prompt_ids + response + ([] if finished else [self.policy_renderer.end_of_turn])
        renderer = self.reward.renderer
        text = renderer.without_control_text(self.policy_renderer.decode(response))
        return renderer.prompt(messages) + renderer.response(messages, text)
