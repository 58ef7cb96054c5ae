"""Settings of the trainer at the only place where they count: the gradient that an optimiser steps with, its learning
rate, whether it steps, and what a run that breaks down leaves behind. Worked on the tables of test_estimate.

The gradient of log p(x) by the logits is onehot(x) - p. Where a test says nothing else the policy is uniform, so that
of EOS is [-1/3, -1/3, 2/3].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.errors import AlignError, Interrupted, RolloutError
from align.models.value import shared_head
from align.recipe.data_settings import DataSettings
from align.recipe.training_settings import CheckpointSettings, OptimSettings
from stages.ppo.checkpoint import load_checkpoint
from stages.ppo.loop import Loop
from stages.ppo.ptx import Demonstrations
from stages.ppo.settings import ClipSettings, CriticSettings, KLSettings, PtxSettings
from stages.ppo.trainer import PPOTrainer
from tests.ppo.table_model import EOS, PAD, PROMPT, A, TableModel
from tests.ppo.test_estimate import STILL, batch, config, expect, make_trainer, policy, table
from tests.ppo.test_loop import assert_same_run
from tests.ppo.test_planted_faults import Run

END = (EOS,)
BY_LOGITS = torch.tensor([-1 / 3, -1 / 3, 2 / 3], dtype=torch.float64)
"""Gradient of a uniform policy's log p(EOS)."""
ONE = torch.tensor([0])
"""The minibatch of a rollout with one response."""


def gradients(trainer: PPOTrainer) -> dict[str, list[Tensor]]:
    """What each model's table is stepped with, as it happens."""
    seen: dict[str, list[Tensor]] = {name: [] for name in trainer.models}
    for name, role in trainer.models.items():
        weights = next(iter(role.parameters()))

        def keep(*_: Any, name: str = name, weights: Tensor = weights) -> None:
            assert weights.grad is not None
            seen[name].append(weights.grad.clone())

        trainer.optimisers[name].adamw.register_step_pre_hook(keep)
    return seen


def stepped_with(trainer: PPOTrainer, scored: dict[tuple[int, ...], float], width: int = 3) -> dict[str, Tensor]:
    """The gradients of the only step that is made with one rollout of these responses and scores."""
    seen = gradients(trainer)
    trainer.improve(trainer.observe(*batch(scored, width)), 0)
    return {name: gradient for name, (gradient,) in seen.items()}


def test_the_entropy_bonus_makes_the_likely_less_likely():
    """Row 29: p = [1/2, 1/4, 1/4] has H = 1.5 log 2 and dH/dz = -p (log p + H) = log 2 [-1/4, 1/8, 1/8]. With value and
    score both 1 there is no advantage; what is minimised is -.1 H, so the gradient is .1 log 2 [1/4, -1/8, -1/8]."""
    trainer = make_trainer(config(entropy_coef=0.1), actor={(): [0.5, 0.25, 0.25]}, values={(): 1.0})
    found = stepped_with(trainer, {END: 1.0})["actor"]
    expected = 0.1 * math.log(2) * torch.tensor([0.25, -0.125, -0.125], dtype=torch.float64)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("normaliser", "divisor"), [("tokens", 3), ("constant", 6)])
def test_a_constant_normaliser_is_the_cap_and_not_the_width(normaliser, divisor):
    """Dr. GRPO: two responses of one and two tokens are a rollout of width 2 under a cap of 3, so 2 * 3 divides and not
    2 * 2. At lambda 1 scores of 1 and 2 are the advantages and targets of all their tokens. At the root -(1 *
    [-1/3, -1/3, 2/3] + 2 * [2/3, -1/3, -1/3]) = [-1, 1, 0]; after a, twice the negative gradient of EOS. The critic: -1
    - 2 at the root, -2 after a."""
    trainer = make_trainer(config(normaliser=normaliser, lam=1.0))
    found = stepped_with(trainer, {END: 1.0, (A, EOS): 2.0}, width=2)
    by_actor = table({(): [-1 / divisor, 1 / divisor, 0.0], (A,): (-2 / divisor * BY_LOGITS).tolist()}, 3)
    torch.testing.assert_close(found["actor"], by_actor, rtol=0, atol=1e-12)
    by_critic = table({(): [-3 / divisor], (A,): [-2 / divisor]}, 1)
    torch.testing.assert_close(found["critic"], by_critic, rtol=0, atol=1e-12)


class Trunk(TableModel):
    """A policy with states that are trained: rows of four numbers, three logits and one that only a critic reads."""

    width = 4

    def states(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return super().states(input_ids, attention_mask, position_ids) @ self.table

    def head(self, states: Tensor) -> Tensor:
        logits = states[..., :3]
        return torch.cat([logits.new_full((*logits.shape[:-1], A), -1e4), logits], -1)


@pytest.mark.parametrize("coef", [0.1, 0.25])
def test_the_value_loss_weighs_less_in_a_shared_trunk(coef):
    """Row 54: the state at the root is [0, 0, 0, 1], the head reads twice its last number: V = 2. With score 1, A = -1
    and V - R = 1. The trunk gets +[-1/3, -1/3, 2/3] in the logits, whatever the coefficient, and coef * 1 * 2 where
    the critic reads."""
    actor = Trunk(table({(): [0.0, 0.0, 0.0, 1.0]}, 4))
    critic: Any = shared_head(actor)  # type: ignore[arg-type]
    critic.head.double().start_from(torch.tensor([[0.0, 0.0, 0.0, 2.0]]), 0.0)
    settings = config(critic=CriticSettings(kind="shared-head", coef=coef, optim=STILL))
    trainer = PPOTrainer(settings, actor, critic, policy({}), seed=0)  # type: ignore[arg-type]
    found = stepped_with(trainer, {END: 1.0})["actor"]
    torch.testing.assert_close(found, table({(): [*BY_LOGITS.tolist(), 2 * coef]}, 4), rtol=0, atol=1e-12)


def test_demonstrations_add_their_likelihood_and_take_turns():
    """PTX, row 80: at coefficient .5 a step's gradient grows by half that of the mean -log p per token. Of the response
    EOS: -.5 [-1/3, -1/3, 2/3] at the root; of a, EOS, which has two tokens: -.25 [2/3, -1/3, -1/3] there, -.25 [-1/3,
    -1/3, 2/3] after a. In batches of one the two steps of two rollouts see both, each once."""
    rows = [([PROMPT], [EOS]), ([PROMPT, PROMPT], [A, EOS])]
    mixed = config(ptx=PtxSettings(data=DataSettings(path="demonstrations.jsonl"), coef=0.5, batch_size=1))
    steps = []
    for trainer in (
        make_trainer(config()),
        make_trainer(mixed, demonstrations=Demonstrations(rows, 1, seed=0, pad_id=PAD)),
    ):
        seen = gradients(trainer)
        for index in range(2):
            trainer.improve(trainer.observe(*batch({END: 1.0})), index)
        steps.append(torch.stack(seen["actor"]))
    added = (steps[1] - steps[0])[:, :2].flatten(1)  # the root, and the state after a
    first = int(added[0, 0] < 0)  # the order of the two is the seed's
    at_once = [1 / 6, 1 / 6, -1 / 3, 0.0, 0.0, 0.0]
    after_a = [-1 / 6, 1 / 12, 1 / 12, 1 / 12, 1 / 12, -1 / 6]
    expect(added, [[at_once, after_a][first], [after_a, at_once][first]], atol=1e-8)


def test_the_average_begins_when_the_actor_does():
    """Row 79: started at 0 in place of the weights, to see each update. Decay .5: still 0 after a rollout of critic
    warm-up, then w1 / 2 and w1 / 4 + w2 / 2."""
    moving = OptimSettings(lr=0.1, schedule="constant")
    settings = config(ema=0.5, optim=moving, critic=CriticSettings(optim=STILL, warmup_rollouts=1))
    trainer = make_trainer(settings, actor={(): [0.5, 0.25, 0.25]})
    assert trainer.ema is not None
    average = trainer.ema.averages["table"].zero_()
    weights = []
    for index, parts in enumerate(([], [0.5], [0.25, 0.5])):
        trainer.improve(trainer.observe(*batch({END: 1.0})), index)
        if parts:
            weights.append(next(iter(trainer.actor.parameters())).detach().clone())
        expected = sum((part * one for part, one in zip(parts, weights, strict=True)), torch.zeros_like(average))
        torch.testing.assert_close(average, expected, check_dtype=False, rtol=0, atol=1e-6)


def test_the_kl_in_the_loss_has_the_adapted_weight():
    """Rows 32 and 35: KL 12 at a target of 6, 8 responses, horizon 160: .15 becomes .15 (1 + .2 * 8 / 160) = .1515.
    p(EOS) is 1/2 and the reference's 1/4, so k1 = log 2; without an advantage the gradient is .1515 log 2 (onehot - p),
    onehot - p = [-1/4, -1/4, 1/2]."""
    settings = config(kl=KLSettings(coef=0.15, estimator="k2", target=6.0, horizon=160))
    actor, reference = {(): [0.25, 0.25, 0.5]}, {(): [0.5, 0.25, 0.25]}
    trainer = make_trainer(settings, actor=actor, reference=reference, values={(): 1.0})
    trainer.adapt(12.0, 0, 8)
    found = stepped_with(trainer, {END: 1.0})["actor"]
    expected = 0.1515 * math.log(2) * torch.tensor([-0.25, -0.25, 0.5], dtype=torch.float64)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("limit", "updates"), [(0.008, 1), (0.009, 2)])
def test_the_limit_of_approxkl(limit, updates):
    """Row 78: Adam's first step is .1 against the sign of the gradient -[-1/3, -1/3, 2/3], so the logits become [-.1,
    -.1, .1] and log p(EOS) .1 - log(e^.1 + 2 e^-.1) = -.969817, from -log 3 = -1.098612. The second epoch finds an
    approximate KL of .128795^2 / 2 = .008294."""
    moving = OptimSettings(lr=0.1, eps=1e-9, schedule="constant", max_grad_norm=1e9)
    trainer = make_trainer(config(epochs=2, optim=moving, clip=ClipSettings(approxkl=limit)))
    metrics = trainer.improve(trainer.observe(*batch({END: 1.0})), 0)
    assert metrics["policy/updates"] == trainer.num_steps == updates
    assert metrics["policy/approxkl_avg"] == pytest.approx(0.008294 * (updates - 1) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("clip", "ratio", "advantage", "factor"),
    [
        ({}, 1.25, 1.0, 0.0),
        ({"policy": 0.3}, 1.25, 1.0, -1.25),
        ({"policy_high": 0.3}, 1.25, 1.0, -1.25),
        ({"policy_high": 0.3}, 1.35, 1.0, 0.0),
        ({"policy_high": 0.3}, 0.75, -1.0, 0.0),
        ({"policy": 0.3, "policy_high": 0.2}, 0.75, -1.0, 0.75),
        ({}, 4.0, -1.0, 4.0),
        ({"dual": 3.0}, 4.0, -1.0, 0.0),
        ({"dual": 5.0}, 4.0, -1.0, 4.0),
    ],
)
def test_the_recipes_clip_ranges_reach_the_policy_loss(clip, ratio, advantage, factor):
    """H, rows 63 and 64: a token within its range has the gradient -A ratio (onehot - p), one that has left it on the
    side where A would have it has none; with dual c neither has one with A < 0 and a ratio above c."""
    trainer = make_trainer(config(clip=ClipSettings(**clip)))
    seen, rollout = gradients(trainer), trainer.observe(*batch({END: 1.0}))
    given = replace(rollout, logp_old=rollout.logp_old - math.log(ratio), advantages=advantage * rollout.learned)
    trainer._step(given, ONE, 1.0, train_actor=True, is_first=False)
    torch.testing.assert_close(seen["actor"][0][0], factor * BY_LOGITS, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("clip", "target", "gradient"), [(None, 2.0, -1.0), (0.2, 2.0, 0.0), (0.6, 2.0, -1.0), (0.2, 0.0, 1.0)]
)
def test_the_recipes_clip_range_reaches_the_value_loss(clip, target, gradient):
    """I, row 53: V = 1 was .5. At a clip of .2 it counts as .7: for the target 2, 1.3^2 is more than 1^2, so the
    loss is a constant; for the target 0, 1^2 is more, and the gradient V - R. At .6 nothing is clipped."""
    trainer = make_trainer(config(clip=ClipSettings(value=clip)), values={(): 1.0})
    seen, rollout = gradients(trainer), trainer.observe(*batch({END: 1.0}))
    first = rollout.learned.double()
    given = replace(rollout, values=0.5 * first, returns=target * first)
    trainer._step(given, ONE, 1.0, train_actor=True, is_first=False)
    assert float(seen["critic"][0][0]) == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(("warmup", "factors"), [(0.0, [1, 0.75, 0.5, 0.25]), (0.5, [1 / 3, 2 / 3, 1, 0.5])])
def test_the_actors_schedule_begins_when_the_actor_does(warmup, factors):
    """Rows 59, 74 and 75: of six rollouts the first two train the critic alone. By hand, linear: the critic goes by
    (6 - i) / 6 from rollout 0, the actor by (4 - i) / 4 over the other four; a warm-up of half of those is 1/3, 2/3.
    Until then its rate is reported as 0."""
    linear = {"schedule": "linear", "eps": 1e-5}
    settings = config(
        rollouts=6,
        optim=OptimSettings(lr=0.02, warmup=warmup, **linear),
        critic=CriticSettings(optim=OptimSettings(lr=0.3, **linear), warmup_rollouts=2),
    )
    trainer = make_trainer(settings)
    used: dict[str, list[float]] = {"actor": [], "critic": []}
    for name, optimiser in trainer.optimisers.items():
        optimiser.adamw.register_step_pre_hook(
            lambda given, *_, name=name: used[name].append(given.param_groups[0]["lr"])
        )
    reported = [trainer.improve(trainer.observe(*batch({END: 1.0})), index)["lr"] for index in range(6)]
    assert used["actor"] == pytest.approx([0.02 * factor for factor in factors])
    assert used["critic"] == pytest.approx([0.3 * (6 - index) / 6 for index in range(6)])
    assert reported == pytest.approx([0, 0, *used["actor"]])


class GivesUp:
    """Whatever is called in each rollout, until it raises in rollout number `index`."""

    def __init__(self, inner: Callable[..., Any], error: AlignError, index: int):
        self.inner, self.error, self.left = inner, error, index

    def __call__(self, *given: Any) -> Any:
        if self.left == 0:
            raise self.error
        self.left -= 1
        return self.inner(*given)


def short_loop(directory: Path) -> Loop:
    """Four rollouts on the table language, and no checkpoint in between."""
    directory.mkdir(exist_ok=True)
    return Run(settings={"rollouts": 4, "checkpoint": CheckpointSettings(every_steps=100)}).loop(directory)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """Without interruption."""
    loop = short_loop(tmp_path_factory.mktemp("straight"))
    loop.run()
    return loop


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("error", [RolloutError("gave up"), Interrupted("stopped")])
@pytest.mark.parametrize("where", ["engine", "reward"])
def test_what_was_learned_is_kept_when_a_rollout_fails(where, error, index, straight, tmp_path):
    """An engine or an endpoint that gives up, or a signal while one is waited for, in any rollout: all rollouts before
    are in a checkpoint (none when there is none before), and starting again ends bit for bit where an undisturbed run
    does."""
    loop = short_loop(tmp_path)
    if where == "engine":
        loop.engine.generate = GivesUp(loop.engine.generate, error, index)  # type: ignore[method-assign]
    else:
        loop.rewarder = GivesUp(loop.rewarder, error, index)  # type: ignore[assignment]
    with pytest.raises(type(error)):
        loop.run()
    resumed = short_loop(tmp_path)
    assert load_checkpoint(resumed.context, resumed.trainer)[0] == index
    resumed.run()
    assert_same_run(resumed, straight)
