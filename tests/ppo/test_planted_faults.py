"""Every alarm is raised by a real fault, planted in a loop that runs; the same run without the fault is silent.

Most faults are planted in the language of table_model: the loop, trainer, scorer and metrics of a run, with lookup
tables as models. Its healthy run learns to answer without b. What only a neural network can do wrong is planted in the
loop of test_loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
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
from align.evaluation.scorer import RewardModel, RewardScorer
from align.job import Input, Job
from align.models.opened import Opened
from align.recipe.training_settings import CheckpointSettings, OptimSettings
from align.rewards.settings import RewardTerm
from stages.ppo.alarms import RULES
from stages.ppo.config import Config
from stages.ppo.loop import Loop, Question
from stages.ppo.scorer import Rewarder
from stages.ppo.settings import CriticSettings, KLSettings, RolloutSettings
from stages.ppo.trainer import PPOTrainer
from tests.ppo.conftest import Tiny
from tests.ppo.table_model import DEPTH, EOS, PAD, PROMPT, STATES, A, B, TableModel, child, complete_responses
from tests.ppo.table_run import TableEngine
from tests.ppo.test_loop import make_config, make_loop

ROWS, ROLLOUTS = 256, 30
Response = tuple[int, ...]
Score = Callable[[Response], float]


class SeparateEngine(TableEngine):
    """An engine with weights of its own that reports its log-probabilities. Its faults: it samples only from the
    `most_likely` tokens, or never gets new weights. It does not say that it is independent: the parity guard would stop
    the run before an alarm could see anything."""

    def __init__(self, policy: TableModel, most_likely: int = 3, syncs: bool = True):
        super().__init__(TableModel(policy.table.detach()))
        self.policy, self.most_likely, self.syncs = policy, most_likely, syncs

    def sync(self) -> None:
        if self.syncs:
            table = self.policy.table.detach()
            unlikely = table < table.topk(self.most_likely).values[:, -1:]
            self.model = TableModel(table.masked_fill(unlikely, -1e4))


def no_b(response: Response) -> float:
    """A normalised reward that does not depend on length, as far as the policy is concerned."""
    return -0.6 if B in response else 0.6


def policy(a: float = 0.25, b: float = 0.15) -> Tensor:
    """Log-probabilities (STATES, 3) of a policy that says a and b with these probabilities, or else ends."""
    return torch.tensor([a, b, 1 - a - b]).log().expand(STATES, 3)


REFERENCE = policy()
ZEROS = torch.zeros(STATES, 1)
ALTERNATING = torch.tensor([3.0, -3.0]).repeat(STATES // 2)[:, None]
"""Values that have nothing to do with the returns."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run on the table language. The defaults are healthy."""

    scores: tuple[Score, Score] = (no_b, no_b)
    """Of the two reward models of an ensemble."""
    start: Tensor = REFERENCE
    reference: Tensor = REFERENCE
    first_values: Tensor = ZEROS
    engine: Callable[[TableModel], SeparateEngine] = SeparateEngine
    max_training_score: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def loop(self, directory: Path) -> Loop:
        config, opened = settings(**self.settings), language()
        reference = Input("policy", "table", fingerprint="0", source="table")
        start = reference if self.start is self.reference else replace(reference, fingerprint="1")
        inputs = {"policy": start, "reference": reference}
        job = Job("ppo", "ppo", 1, "0" * 64, 0, str(directory), {}, inputs, {}, [], {})
        actor, critic, frozen = (TableModel(table) for table in (self.start, self.first_values, self.reference))
        scorers = [RewardScorer(reward_model(score, opened), opened, ROWS) for score in self.scores]
        return Loop(
            config,
            Context(job),
            Accelerator(cpu=True),
            PPOTrainer(config, actor, critic, frozen, seed=0),
            self.engine(actor),
            Rewarder({"reward": RewardTerm(model=["one", "two"])}, {"reward": scorers}, {}, opened.renderer),
            opened.renderer,
            [Question([{"role": "user", "content": "?"}], [PROMPT])],
            max_training_score=self.max_training_score,
        )


def optimiser(lr: float) -> OptimSettings:
    """With a constant rate a shorter run is the beginning of a longer one."""
    return OptimSettings(lr=lr, eps=1e-5, schedule="constant")


def settings(**changes) -> Config:
    known = {
        "rollouts": ROLLOUTS,
        "rollout": RolloutSettings(prompts=ROWS, max_response_tokens=DEPTH),
        "epochs": 2,
        "minibatches": 2,
        "micro_batch_size": ROWS,
        "kl": KLSettings(coef=0.1),
        "optim": optimiser(0.03),
        "critic": CriticSettings(optim=optimiser(0.05)),
        "checkpoint": CheckpointSettings(every_steps=ROLLOUTS),
    }
    return Config(**{**known, **changes})


def language() -> Opened:
    """The language's tokenizer. It has no model of transformers."""
    words = {"<pad>": PAD, "?": PROMPT, "a": A, "b": B, "<eos>": EOS}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    return Opened(None, tokenizer, Renderer(tokenizer, "plain"))


def reward_model(score: Score, opened: Opened) -> RewardModel:
    """A lookup table of the scores of all complete responses."""
    table = torch.zeros(STATES, 1)
    for response in complete_responses():
        state = 0
        for token in response:
            state = child(state, token)
        table[state] = score(response)
    return RewardModel(TableModel(table), opened.tokenizer, opened.renderer)


def watched(loop: Loop) -> tuple[list[str], str]:
    """Runs a loop: the names of all alarms in metrics.jsonl, and what was printed, whether or not it ended well."""
    printed, error = StringIO(), ""
    with redirect_stderr(printed):
        try:
            loop.run()
        except NumericError as caught:
            error = str(caught)
    names = [name for row in loop.context.metrics.read() for name in row["alarms"]]
    return names, " ".join(f"{printed.getvalue()} {error}".split())


HEALTHY = Run()
FLAT = Run(start=policy(0.3, 0.25))
"""Starts from another policy than its reference, a flatter one."""


def scored(score: Score) -> Run:
    """The healthy run with another reward."""
    return Run(scores=(score, score))


def with_settings(**changes) -> Run:
    return Run(settings=changes)


def pays_for_length(response: Response) -> float:
    return len(response) - 1.5


def pays_for_long_ones(response: Response) -> float:
    return no_b(response) + 2.0 * (len(response) == DEPTH)


def exploitable(response: Response) -> float:
    """No score of the training data is above 1."""
    return 3.0 if response[:2] == (B, B) else no_b(response)


def optimistic(response: Response) -> float:
    """Agrees with `no_b` on 94 % of what the policy says at first."""
    return 3.0 if response[:2] == (A, A) else no_b(response)


def enormous(response: Response) -> float:
    return 3e19 if response == (A, A, EOS) else no_b(response)


STALE = Run(engine=partial(SeparateEngine, syncs=False))
TALKATIVE = policy(0.4, 0.55)
NEVER_ENDS = Run(start=TALKATIVE, reference=TALKATIVE)
WRONG_CRITIC = Run(first_values=ALTERNATING, settings={"critic": CriticSettings(optim=optimiser(1e-9))})
LARGE_STEPS = with_settings(optim=optimiser(0.5))
ONE_RESPONSE = scored(lambda response: float(response == (A, EOS)))
TIGHT_CAP = with_settings(rollout=RolloutSettings(prompts=ROWS, max_response_tokens=1))

FAULTS = [
    ("not_finite", "scores are too large for float32", scored(enormous)),
    ("negative_kl", "top-k", replace(FLAT, engine=partial(SeparateEngine, most_likely=2))),
    ("negative_kl", "stale weights", STALE),
    ("kl_estimators_differ", "not sampled from the policy", STALE),
    ("kl_estimators_differ", "tokens the reference likes are never drawn", LARGE_STEPS),
    ("few_responses_end", "never learned to stop", NEVER_ENDS),
    ("length_at_cap", "rollout.max_response_tokens is too low", TIGHT_CAP),
    ("length_at_cap", "prefers length", scored(pays_for_length)),
    ("score_follows_length", "at first by 1.00", scored(pays_for_length)),
    ("score_follows_length", "may be paying for length", scored(pays_for_long_ones)),
    ("score_beyond_training", "it is being exploited", scored(exploitable)),
    ("critic_explains_nothing", "raise critic.optim.lr", WRONG_CRITIC),
    ("clips_too_much", "steps are too large", LARGE_STEPS),
    ("steps_too_large", "lower optim.lr or epochs", LARGE_STEPS),
    ("entropy_collapse", "raise kl.coef", replace(ONE_RESPONSE, settings={"kl": KLSettings(coef=0)})),
    ("diversity_falls", "responses are becoming alike", ONE_RESPONSE),
    ("ensemble_disagrees", "it rises where they were not trained", Run(scores=(no_b, optimistic))),
    ("cutting_pays", "is the reward normalised?", scored(lambda response: no_b(response) - 5)),
    ("value_clip_lags", "normalise the reward", scored(lambda response: 10 * no_b(response))),
    ("engine_differs", "stale weights", STALE),
]


@pytest.mark.parametrize("run", [HEALTHY, FLAT], ids=["healthy", "flat"])
def test_the_runs_without_a_fault_are_silent(run, tmp_path):
    """All the rollouts that the faults below are given, and every rule had the metrics that it needs to speak."""
    loop = run.loop(tmp_path)
    assert watched(loop)[0] == []
    known = {name for row in loop.context.metrics.read() for name in row} | loop.reporter.facts.keys()
    known |= {f"first/{name}" for name in loop.reporter.history.first}
    assert [name for rule in RULES for name in rule.needs if name not in known] == []


def test_every_rule_has_a_planted_fault():
    assert {name for name, *_ in FAULTS} == {rule.name for rule in RULES}


@pytest.mark.parametrize(("name", "cause", "run"), FAULTS, ids=[f"{name}-{cause}" for name, cause, _ in FAULTS])
def test_planted_fault(name, cause, run, tmp_path):
    """One fault in a silent run: its alarm is in metrics.jsonl, and what is printed says the cause."""
    names, printed = watched(run.loop(tmp_path))
    assert name in names
    assert cause in printed


def dropout(loop: Loop) -> None:
    """Attention drops a third again, in training mode."""
    model: Any = loop.trainer.actor.module
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3


def dropout_and_another_reference(loop: Loop) -> None:
    """Where the reference is another model, it cannot tell."""
    dropout(loop)
    inputs = loop.context.job.inputs
    inputs["reference"] = replace(inputs["reference"], fingerprint="another")


@torch.no_grad()
def changed_reference(loop: Loop) -> None:
    """One weight matrix is not that of the model the policy starts from."""
    next(loop.trainer.reference.module.parameters()).mul_(1.05)


@torch.no_grad()
def lost_reference(loop: Loop) -> None:
    next(loop.trainer.reference.module.parameters()).fill_(torch.nan)


@torch.no_grad()
def lost_reward(loop: Loop) -> None:
    next(loop.rewarder.models["reward"][0].reward.role.module.parameters()).fill_(torch.nan)


@torch.no_grad()
def lost_critic(loop: Loop) -> None:
    next(loop.trainer.models["critic"].parameters()).fill_(torch.nan)


REFUSED = [
    (dropout, "differs from its reference .* is dropout off"),
    (dropout_and_another_reference, "of the same policy differ .* is dropout on"),
    (changed_reference, "is the reference the model that the policy starts from"),
    (lost_reference, "differs from its reference by nan"),
    (lost_reward, r"reward model reward: response 1 of 6 \(.*\) got nan"),
    (lost_critic, "gradient norm is nan at optimiser step 1; nothing was updated"),
]


def test_a_real_model_without_a_fault_is_not_refused(tiny, tmp_path):
    assert make_loop(tiny, tmp_path, make_config(rollouts=1)).run() == 1


@pytest.mark.parametrize(("plant", "cause"), REFUSED)
def test_refused_at_once(plant, cause, tiny: Tiny, tmp_path):
    """R1, R2 and NaN weights: the first rollout stops the run with the cause, and nothing has been updated."""
    loop = make_loop(tiny, tmp_path, make_config(rollouts=1))
    plant(loop)
    before = [weight.clone() for weight in weights(loop)]
    with pytest.raises(NumericError, match=cause):
        loop.run()
    for one, other in zip(before, weights(loop), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_scores_whose_gradient_overflows_are_refused(tmp_path):
    """Scores of 6e29 are finite, and so are the critic's errors; the squares that its gradient's norm adds up are not.
    The actor, whose advantages are whitened, is not updated either."""
    loop = scored(lambda response: 1e30 * no_b(response)).loop(tmp_path)
    with pytest.raises(NumericError, match=r"critic's gradient norm is inf .* normalise the reward"):
        loop.run()
    assert torch.equal(next(loop.trainer.actor.parameters()), REFERENCE)


def weights(loop: Loop) -> list[Tensor]:
    return [weight for role in loop.trainer.models.values() for weight in role.parameters()]
