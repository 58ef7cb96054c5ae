"""From scores to advantages through PPOTrainer.observe: what the settings of rules and estimators come to, by hand.

Lookup tables in float64 that say what a test gives them and nothing else: of states that are not named, a policy is
uniform and the value is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

from align.recipe.training_settings import OptimSettings
from stages.ppo.config import Config
from stages.ppo.ptx import Demonstrations
from stages.ppo.rewards import at_the_end
from stages.ppo.rollout import Responses
from stages.ppo.settings import (
    ClipSettings,
    CriticSettings,
    KLSettings,
    MissingEosSettings,
    OverlongSettings,
    RolloutSettings,
)
from stages.ppo.trainer import PPOTrainer
from tests.ppo.table_model import DEPTH, EOS, STATES, A, B, Batch, TableModel, child

Response = tuple[int, ...]
STILL = OptimSettings(lr=1e-9, eps=1e-5, schedule="constant", max_grad_norm=1e9)
"""Takes steps that move nothing by more than 1e-9, and never clips a gradient."""


def config(**changes) -> Config:
    """The plain sum of the policy and the value loss: no KL, whitening or clipping of values."""
    known = {
        "rollouts": 4,
        "rollout": RolloutSettings(prompts=8, max_response_tokens=DEPTH),
        "epochs": 1,
        "kl": KLSettings(coef=0.0),
        "clip": ClipSettings(value=None),
        "whiten_advantages": False,
        "optim": STILL,
        "critic": CriticSettings(optim=STILL),
    }
    return Config(**{**known, **changes})


def table(rows: Mapping[Response, Sequence[float]], width: int) -> Tensor:
    """(STATES, width) of 0, but for the given prefixes of a response."""
    given = torch.zeros(STATES, width, dtype=torch.float64)
    for prefix, row in rows.items():
        given[reduce(child, prefix, 0)] = torch.tensor(row, dtype=torch.float64)
    return given


def policy(rows: Mapping[Response, Sequence[float]]) -> TableModel:
    """A policy of these probabilities of A, B and EOS."""
    return TableModel(table({prefix: [math.log(p) for p in row] for prefix, row in rows.items()}, 3))


def critic(values: Mapping[Response, float]) -> TableModel:
    """A critic that says these values."""
    return TableModel(table({prefix: [value] for prefix, value in values.items()}, 1))


def make_trainer(
    settings: Config,
    *,
    actor: Mapping[Response, Sequence[float]] | None = None,
    reference: Mapping[Response, Sequence[float]] | None = None,
    values: Mapping[Response, float] | None = None,
    demonstrations: Demonstrations | None = None,
) -> PPOTrainer:
    """Policies as in `policy`, values as in `critic`; uniform and 0 when not given."""
    roles: Any = (policy(actor or {}), critic(values or {}), policy(reference or {}))
    warmup = settings.critic.warmup_rollouts or 0
    return PPOTrainer(settings, *roles, seed=0, warmup=warmup, demonstrations=demonstrations)


def batch(scored: Mapping[Response, float], width: int = DEPTH) -> tuple[Responses, Tensor]:
    """Responses after prompts of one to four tokens, and the scores (B,T) of each of them as a whole."""
    given = Batch.of(list(scored), width=width)
    scores = at_the_end(torch.tensor(list(scored.values()), dtype=torch.float64), given.lengths, width)
    return Responses(given.input_ids, given.attention_mask, given.lengths, given.finished, width), scores


def expect(ours: Tensor, rows: Sequence[Sequence[float]], atol: float = 1e-12) -> None:
    """`ours` (B,T) is `rows` of any length, 0 behind each."""
    wanted = [[*row, *[0.0] * (ours.shape[1] - len(row))] for row in rows]
    torch.testing.assert_close(ours, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=atol)


VALUES = {(): 0.5, (A,): 0.6, (A, A): 0.7, (A, A, A): 0.8, (A, A, EOS): 9.0}
ENDED = (A, A, EOS)


def test_a_cut_response_goes_on_with_the_value_after_its_last_token():
    """Row 10, A2, with V = .5, .6, .7, and .8 after three tokens; lambda .95, scores of cut responses dropped.

    Cut after three tokens: delta = [.6-.5, .7-.6, .8-.7], A = [.1+.95*.195, .1+.95*.1, .1] = [.28525, .195, .1]; the
    value before the last token in place of the one after it would leave 0 at the end. Cut after two, next to longer
    rows: [.195, .1]. A response that ended has nothing after it, whatever the critic says there: A = [.1+.95*.385,
    .1+.95*.3, 1-.7]."""
    trainer = make_trainer(config(missing_eos=MissingEosSettings(rule="bootstrap")), values=VALUES)
    rollout = trainer.observe(*batch({(A, A, A): 5.0, (A, A): 5.0, ENDED: 1.0}))
    expect(rollout.advantages, [[0.28525, 0.195, 0.1], [0.195, 0.1], [0.46575, 0.385, 0.3]])
    assert rollout.returns is not None
    expect(rollout.returns, [[0.78525, 0.795, 0.8], [0.695, 0.7], [0.96575, 0.985, 1.0]])


@pytest.mark.parametrize(
    ("lam", "lam_value", "advantages", "returns"),
    [
        (0.95, None, [0.46575, 0.385, 0.3], [0.96575, 0.985, 1.0]),
        (0.95, 1.0, [0.46575, 0.385, 0.3], [1.0, 1.0, 1.0]),
        (1.0, 0.0, [0.5, 0.4, 0.3], [0.6, 0.7, 1.0]),
    ],
)
def test_the_critic_may_have_a_lambda_of_its_own(lam, lam_value, advantages, returns):
    """Row 46, decoupled GAE: delta = [.1, .1, .3] for score 1, so lambda 0, .95 and 1 give A = delta, [.46575, .385,
    .3] and [.5, .4, .3]. Targets are V plus the A of lam_value, and of lam where it is not given."""
    trainer = make_trainer(config(lam=lam, lam_value=lam_value), values=VALUES)
    rollout = trainer.observe(*batch({ENDED: 1.0}))
    expect(rollout.advantages, [advantages])
    assert rollout.returns is not None
    expect(rollout.returns, [returns])


def test_lambda_by_length_is_the_actors_alone():
    """U with alpha .5: three tokens have lambda 1 - 1/1.5 = 1/3, two have 0. delta = [.1, .1, .3] becomes [.1+.2/3,
    .1+.3/3, .3]; for b and EOS with V = .5, .4 and score 1, delta = [-.1, .6] stays. Targets by lam .95, as before:
    .5+.46575, .6+.385, 1; .5-.1+.95*.6 = .97, 1."""
    trainer = make_trainer(config(lam_length=0.5), values={**VALUES, (B,): 0.4})
    rollout = trainer.observe(*batch({ENDED: 1.0, (B, EOS): 1.0}))
    expect(rollout.advantages, [[1 / 6, 0.2, 0.3], [-0.1, 0.6]])
    assert rollout.returns is not None
    expect(rollout.returns, [[0.96575, 0.985, 1.0], [0.97, 1.0]])


@pytest.mark.parametrize(("estimator", "reward"), [("k1", 1 - 0.5 * math.log(2)), ("k2", 1.0)])
def test_the_kl_is_charged_once(estimator, reward):
    """Row 33: the policy ends at once with probability 1/2, the reference with 1/4, so k1 = log 2. At coefficient .5 a
    score of 1 is a reward of 1 - .5 log 2; with k2, which is in the loss, it is 1."""
    settings = config(kl=KLSettings(coef=0.5, estimator=estimator))
    trainer = make_trainer(settings, actor={(): [0.25, 0.25, 0.5]}, reference={(): [0.5, 0.25, 0.25]})
    expect(trainer.observe(*batch({(EOS,): 1.0})).rewards, [[reward]])


@pytest.mark.parametrize(("rule", "cut"), [("replace", -3.5), ("subtract", -1.5), ("off", 1.5)])
def test_order_of_the_rules(rule, cut):
    """Rows 9, 40, 45: clip, then missing EOS, then the overlong penalty. Scores of 9 are clipped to 2. With a cap of
    three tokens, a buffer of two and a penalty of .5, one, two and three tokens lose 0, .25 and .5, cut or not.

    The rule's -3 is not clipped, nor does it undo the penalty: replaced -3 - .5, lowered 2 - 3 - .5, as it is 2 - .5.
    Other orders give -3, -2 or 1.5 for the first two."""
    value = {} if rule == "off" else {"value": -3.0}
    settings = config(
        score_clip=2.0,
        missing_eos=MissingEosSettings(rule=rule, **value),
        overlong=OverlongSettings(buffer=2, penalty=0.5),
    )
    rollout = make_trainer(settings).observe(*batch(dict.fromkeys([(EOS,), (A, EOS), ENDED, (A, A, A)], 9.0)))
    assert rollout.scores.tolist() == [2.0, 1.75, 1.5, cut]
    expect(rollout.rewards, [[2.0], [0.0, 1.75], [0.0, 0.0, 1.5], [0.0, 0.0, cut]])
