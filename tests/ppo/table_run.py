"""Runs of the real trainer on the language of table_model, whose optimum is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from align.generation.engine import Samples, Sampling
from align.recipe.training_settings import OptimSettings
from stages.ppo.config import Config
from stages.ppo.rewards import at_the_end
from stages.ppo.rollout import Responses, join
from stages.ppo.settings import ClipSettings, CriticSettings, KLSettings, MissingEosSettings, RolloutSettings
from stages.ppo.trainer import PPOTrainer
from tests.ppo.table_model import (
    DEPTH,
    EOS,
    PAD,
    PROMPT,
    STATES,
    A,
    B,
    Batch,
    TableModel,
    World,
    child,
    complete_responses,
)

ROWS, ROLLOUTS = 256, 300


class TableEngine:
    """Samples exactly from the distribution of a table, all rows at once. A response that a prompt ends with the
    beginning of goes on."""

    name, summary, independent = "table", "", False

    def __init__(self, model: TableModel):
        self.model = model

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        generator = torch.Generator().manual_seed(sampling.seed)
        logp = self.model.log_policy()
        state = torch.tensor([reached(ids) for ids in prompts])
        is_open = torch.ones(len(prompts), dtype=torch.bool)
        columns, logprobs, lengths = [], [], torch.zeros(len(prompts), dtype=torch.long)
        for _ in range(sampling.max_tokens):
            action = torch.multinomial(logp[state].exp(), 1, generator=generator)
            token = A + action[:, 0]
            columns.append(torch.where(is_open, token, sampling.pad_id))
            logprobs.append(torch.where(is_open, logp[state].gather(1, action)[:, 0], 0).float())
            lengths += is_open.long()
            is_open &= ~torch.isin(token, torch.tensor(sampling.stop_ids))
            state = torch.where(is_open, child(state, token), state)
        return Samples(torch.stack(columns, 1), lengths, ~is_open, torch.stack(logprobs, 1))

    def sync(self) -> None:
        """The table is the trainer's own."""

    def rest(self) -> None:
        """Nothing to do."""


def reached(ids: Sequence[int]) -> int:
    """The state after a prompt."""
    state = 0
    for token in ids:
        state = child(state, token) if token >= A else state
    return state


def raw_scores(samples: Samples) -> Tensor:
    """(B,T) of a reward model that knows nothing of cuts: #a - #b / 2 + 1/2 for EOS. By the rule a cut costs 1."""
    counts = [(samples.token_ids == token).sum(1).double() for token in (A, B)]
    scores = counts[0] - 0.5 * counts[1] + 0.5 * samples.finished.double()
    return at_the_end(scores, samples.lengths, samples.token_ids.shape[1])


def settings(world: World, **changes) -> Config:
    optim = OptimSettings(lr=0.05, eps=1e-5)
    known = {
        "rollouts": ROLLOUTS,
        "rollout": RolloutSettings(prompts=ROWS, max_response_tokens=DEPTH),
        "epochs": 4,
        "micro_batch_size": ROWS,
        "whiten_advantages": False,
        "kl": KLSettings(coef=world.beta),
        "missing_eos": MissingEosSettings(rule="subtract", value=-1.0),
        "optim": optim,
    }
    if changes.get("estimator", "gae") == "gae":
        known |= {"critic": CriticSettings(optim=optim), "clip": ClipSettings(value=None)}
    return Config(**{**known, **changes})


def all_responses(width: int) -> tuple[Responses, Tensor]:
    """The fifteen complete responses after prompts of one to four tokens, and their token scores."""
    batch = Batch.of(complete_responses(), prompt_width=4, width=width)
    responses = Responses(batch.input_ids, batch.attention_mask, batch.lengths, batch.finished, width)
    return responses, at_the_end(batch.scores, batch.lengths, width)


def policies(world: World, config: Config, first_value: float = 0.0, seed: int = 0) -> Iterator[Tensor]:
    """The actor's log-probabilities before the first and after every rollout, started at the reference with a critic
    that says `first_value` everywhere."""
    actor = TableModel(world.ref)
    critic = TableModel(torch.full((STATES, 1), first_value, dtype=torch.float64))
    warmup = config.critic.warmup_rollouts or 0
    trainer = PPOTrainer(
        config, actor, critic if config.has_critic else None, TableModel(world.ref), seed=seed, warmup=warmup
    )
    engine = TableEngine(actor)
    prompts = [[PROMPT]] * config.responses
    yield actor.log_policy()
    for index in range(config.rollouts):
        sampling = Sampling(config.rollout.max_response_tokens, 1.0, (EOS,), PAD, seed=100_000 * seed + index)
        samples = engine.generate(prompts, sampling)
        rollout = trainer.observe(join(prompts, samples, PAD, "cpu"), raw_scores(samples))
        trainer.improve(rollout, index)
        engine.sync()
        yield actor.log_policy()


def trained(world: World, config: Config) -> Tensor:
    """The log-probabilities after all rollouts."""
    *_, last = policies(world, config)
    return last
