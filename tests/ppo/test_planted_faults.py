"""Every alarm is raised by a real fault, planted in a loop that runs: the same run without the fault is silent.

Most faults are planted in the language of table_model: real loop, trainer, scorer and metrics, lookup tables as models.
Its healthy run wants responses without b. The rest, what only a neural network can do wrong, in the loop of test_loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from align.context import Context
from align.data.render import Renderer
from align.errors import NumericError
from align.generation.engine import Samples, Sampling
from align.job import Input, Job
from align.models.opened import Opened
from align.recipe.settings import OptimSettings
from align.rewards.settings import RewardTerm
from align.training.masked import length_mask
from stages.ppo.alarms import RULES
from stages.ppo.config import ClipSettings, Config, CriticSettings, KLSettings, RolloutSettings
from stages.ppo.loop import Loop, Question
from stages.ppo.scorer import Rewarder, RewardModel, RewardScorer
from stages.ppo.trainer import PPOTrainer
from tests.ppo.conftest import Tiny
from tests.ppo.table_model import DEPTH, EOS, PAD, PROMPT, STATES, A, B, TableModel, child, complete_responses
from tests.ppo.table_run import TableEngine
from tests.ppo.test_loop import Wrap, make_config, make_loop

ROWS, ROLLOUTS = 256, 24
Response = tuple[int, ...]


class SeparateEngine(TableEngine):
    """An engine with weights of its own, which reports its log-probabilities. `syncs` False: it never gets new ones."""

    def __init__(self, policy: TableModel, syncs: bool = True, most_likely: int = 3):
        super().__init__(TableModel(policy.table.detach()))
        self.policy, self.syncs, self.most_likely = policy, syncs, most_likely

    def sync(self) -> None:
        if not self.syncs:
            return
        table = self.policy.table.detach()
        dropped = table < table.topk(self.most_likely).values[:, -1:]
        with torch.no_grad():
            self.model.table.copy_(table.masked_fill(dropped, -1e4))


    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        samples = super().generate(prompts, sampling)
        state, columns = torch.zeros(len(prompts), dtype=torch.long), []
        for token in samples.token_ids.T:
            known = state * 3 + (token - A)
            columns.append(self.model.log_policy().flatten()[known.clamp(0, 3 * STATES - 1)])
            state = torch.where(token >= A, child(state, token), state).clamp(max=STATES - 1)
        logprobs = torch.stack(columns, 1).masked_fill(~length_mask(samples.lengths, len(columns)), 0).float()
        return replace(samples, logprobs=logprobs)


def no_b(response: Response) -> float:
    return -0.6 if B in response else 0.6


def reference(end: float = 0.6) -> Tensor:
    """Log-probabilities (STATES, 3) of a policy that ends after each token with probability `end`."""
    return torch.tensor([(1 - end) / 2, (1 - end) / 2, end]).log().expand(STATES, 3).clone()


@dataclass(frozen=True)
class Scenario:
    """A run on the table language. The defaults are healthy."""

    score: Callable[[Response], float] = no_b
    second_score: Callable[[Response], float] | None = None
    """Of the other reward model of the ensemble; None: the same."""
    reference: Tensor = reference()
    first_values: Tensor = torch.zeros(STATES, 1)
    engine: Callable[[TableModel], Any] = SeparateEngine
    settings: dict[str, Any] = None
    max_training_score: float = 1.0


def table_of(score: Callable[[Response], float]) -> Tensor:
    """The scores of all complete responses as a reward model's table (STATES, 1)."""
    table = torch.zeros(STATES, 1)
    for response in complete_responses():
        state = 0
        for token in response:
            state = child(state, token)
        table[state] = score(response)
    return table


def opened() -> Opened:
    words = {"<pad>": PAD, "?": PROMPT, "a": A, "b": B, "<eos>": EOS}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    return Opened(None, tokenizer, Renderer(tokenizer, "plain"))


def settings(**changes) -> Config:
    optim = OptimSettings(lr=0.02, eps=1e-5)
    known = {
        "rollouts": ROLLOUTS,
        "rollout": RolloutSettings(prompts=ROWS, max_response_tokens=DEPTH),
        "epochs": 2,
        "minibatches": 2,
        "micro_batch_size": ROWS,
        "kl": KLSettings(coef=0.1),
        "optim": optim,
        "critic": CriticSettings(optim=OptimSettings(lr=0.05, eps=1e-5)),
    }
    return Config(**{**known, **changes})


def table_loop(scenario: Scenario, directory: Path) -> Loop:
    config = settings(**(scenario.settings or {}))
    directory.mkdir(exist_ok=True)
    policy = Input("policy", "table", fingerprint="0", source="table")
    job = Job("ppo", "ppo", 1, "0" * 64, 0, str(directory), {}, {"policy": policy, "reference": policy}, {}, [], {})
    language = opened()
    actor = TableModel(scenario.reference)
    critic = TableModel(scenario.first_values)
    trainer = PPOTrainer(config, actor, critic, TableModel(scenario.reference), seed=0)
    scorers = [
        RewardScorer(RewardModel(TableModel(table_of(score)), language.tokenizer, language.renderer), language, ROWS)
        for score in (scenario.score, scenario.second_score or scenario.score)
    ]
    rewarder = Rewarder({"reward": RewardTerm(model=["one", "two"])}, {"reward": scorers}, {}, language.renderer)
    return Loop(
        config,
        Context(job),
        Accelerator(cpu=True),
        trainer,
        scenario.engine(actor),
        rewarder,
        language.renderer,
        [Question([{"role": "user", "content": "?"}], [PROMPT])],
        max_training_score=scenario.max_training_score,
    )
