"""The reward of sampled responses: reward models, functions and endpoints, weighted and added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
from align.rewards.batch import RewardBatch, Values, checked, probe
from align.rewards.combine import combine, disagreement
from align.rewards.settings import RewardTerm
from stages.ppo.rewards import at_the_end


@dataclass(frozen=True)
class RewardModel:
    """A reward model as PPO holds it: alone, or an adapter on a shared base."""

    role: Role
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer


@dataclass(frozen=True)
class Scores:
    """The reward of B responses."""

    tokens: Tensor
    """(B,T): the weighted sum of all terms; an outcome is on the last token of its row."""
    terms: dict[str, Tensor]
    """(B,) each: the terms before weighting; process rewards are summed over a row."""
    disagreement: Tensor | None
    """(B,) standard deviation within the ensembles, added up; None without one."""

    @property
    def total(self) -> Tensor:
        """(B,) what a response earns."""
        return self.tokens.sum(1)


class TextScorer(Protocol):
    """A reward function or an endpoint."""

    def __call__(self, batch: RewardBatch) -> Values: ...


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


class Rewarder:
    """All terms of the recipe's reward. `models` hold the scorers of each term's reward models, `texts` the function or
    endpoint of each other term."""

    def __init__(
        self,
        terms: Mapping[str, RewardTerm],
        models: Mapping[str, Sequence[RewardScorer]],
        texts: Mapping[str, TextScorer],
        policy_renderer: Renderer,
    ):
        self.terms, self.models, self.texts = terms, models, texts
        self.renderer = policy_renderer

    def check(self, prompts: Sequence[Sequence[Message]]) -> None:
        """Before the first rollout: raises DataError for a prompt that one of the reward models cannot render, and what
        a function or endpoint raises on an empty response to the first prompt."""
        for scorers in self.models.values():
            for scorer in scorers:
                scorer.check_prompts(prompts)
        for text in self.texts.values():
            text(probe(list(prompts[0]), self.renderer.end_of_turn))

    def __call__(
        self, prompts: Sequence[Sequence[Message]], prompt_ids: Sequence[list[int]], samples: Samples
    ) -> Scores:
        """The reward of one response per prompt."""
        lengths, width = samples.lengths.cpu(), samples.token_ids.shape[1]
        tokens = torch.zeros(samples.token_ids.shape)
        terms, spread = {}, None
        for name, settings in self.terms.items():
            if settings.is_model:
                scores = self._model_scores(name, prompts, prompt_ids, samples)
                part = at_the_end(combine(scores, settings), lengths, width)
                if len(scores) > 1:
                    spread = disagreement(scores) + (0 if spread is None else spread)
            else:
                part = _token_scores(self.texts[name](self._batch(prompts, samples)), lengths, width)
            terms[name] = part.sum(1)
            tokens = tokens + settings.weight * part
        return Scores(tokens, terms, spread)

    def total(self, prompts: Sequence[Sequence[Message]], prompt_ids: Sequence[list[int]], samples: Samples) -> Tensor:
        """(B,) what each response earns: for evaluation."""
        return self(prompts, prompt_ids, samples).total

    def _model_scores(
        self, name: str, prompts: Sequence[Sequence[Message]], prompt_ids: Sequence[list[int]], samples: Samples
    ) -> Tensor:
        """(K,B) of the K reward models of a term. Raises NumericError, naming the response, for one not finite."""
        scores = torch.stack([scorer(prompts, prompt_ids, samples).cpu() for scorer in self.models[name]])
        if not scores.isfinite().all():
            for model, given in zip(self.terms[name].inputs(name), scores.tolist(), strict=True):
                checked(given, self._batch(prompts, samples), f"reward model {model}")
        return scores

    def _batch(self, prompts: Sequence[Sequence[Message]], samples: Samples) -> RewardBatch:
        ids = samples.rows()
        return RewardBatch(
            prompts=[messages[-1]["content"] for messages in prompts],
            messages=[list(messages) for messages in prompts],
            responses=[self.renderer.decode(row) for row in ids],
            response_ids=ids,
            finished=samples.finished.tolist(),
        )


def _token_scores(values: Values, lengths: Tensor, width: int) -> Tensor:
    """What a function or endpoint said, as (B,T)."""
    if values and isinstance(values[0], list):
        rows = [torch.tensor(row, dtype=torch.float32) for row in values]
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    return at_the_end(torch.tensor(values, dtype=torch.float32), lengths, width)
