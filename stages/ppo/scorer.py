"""The reward of sampled responses: reward models, functions and endpoints, weighted and added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from align import ranks
from align.data.render import Renderer
from align.data.rows import Message
from align.errors import Interrupted, RolloutError
from align.evaluation.scorer import RewardScorer
from align.generation.engine import Samples
from align.rewards.batch import RewardBatch, Values, checked, probe
from align.rewards.combine import combine, disagreement
from align.rewards.settings import RewardTerm
from stages.ppo.rewards import at_the_end


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
        """The reward of one response per prompt. Of none, in one of several processes, nobody is asked. An endpoint
        that gives up in one process does so in all, before reward models are asked: for those that are in parts all
        processes are needed.

        Raises what functions and endpoints raise, NumericError for a score that is not finite.
        """
        lengths, width = samples.lengths.cpu(), samples.token_ids.shape[1]
        with ranks.failing_together(Interrupted, RolloutError):
            texts = {name: text(self._batch(prompts, samples)) for name, text in self.texts.items() if prompts}
        tokens = torch.zeros(samples.token_ids.shape)
        terms, spread = {}, None
        for name, settings in self.terms.items():
            if not prompts:
                part = torch.zeros(0, width)
                spread = torch.zeros(0) if len(self.models.get(name, ())) > 1 else spread
            elif settings.is_model:
                scores = self._model_scores(name, prompts, prompt_ids, samples)
                part = at_the_end(combine(scores, settings), lengths, width)
                if len(scores) > 1:
                    spread = disagreement(scores) + (0 if spread is None else spread)
            else:
                part = _token_scores(texts[name], lengths, width)
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
