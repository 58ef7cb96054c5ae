"""Where the estimators without a critic end, through the real trainer, from samples: on the tree of table_model and on
the three-armed bandit of bandit.py, whose fixed points are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.generation.engine import Samples, Sampling
from align.recipe.training_settings import OptimSettings
from stages.ppo.advantages import group_relative
from stages.ppo.config import Config
from stages.ppo.rewards import at_the_end
from stages.ppo.rollout import join
from stages.ppo.settings import KLSettings, MissingEosSettings, RolloutSettings
from stages.ppo.trainer import PPOTrainer
from tests.ppo import bandit
from tests.ppo.table_model import DEPTH, EOS, PAD, PROMPT, STATES, A, TableModel, World
from tests.ppo.table_run import TableEngine, all_responses, settings, trained

GROUP = 4
BOUND = 2e-3
"""Total variation to pi* that the contract allows; 1e-4 is what these runs leave."""


def family(world: World, estimator: str, **changes) -> Config:
    rollout = RolloutSettings(prompts=64, responses_per_prompt=GROUP, max_response_tokens=DEPTH)
    return settings(world, estimator=estimator, rollout=rollout, **changes)


@pytest.mark.parametrize(
    ("estimator", "changes"),
    [("rloo", {}), ("grpo", {"divide_by_std": False}), ("rloo", {"normaliser": "constant"})],
)
def test_with_k1_in_the_reward_they_reach_the_optimum(estimator, changes):
    """E11: REINFORCE with any baseline that does not know the action has pi* as its fixed point, like PPO with a
    critic; Dr. GRPO's mean of all responses only scales the gradient by (G-1)/G."""
    world = World.random(0)
    assert world.distance(world.ref) > 0.3
    assert world.distance(trained(world, family(world, estimator, **changes))) <= BOUND


def test_without_any_baseline_the_noise_decides():
    """reinforce++ has pi* as fixed point too, but at pi* a token's advantage is V*(s) less the mean and not 0: what
    keeps it there is an average. It needs a rate that goes to 0 slowly, and more rollouts: .006 after 600, where rloo
    is at .0001 after 300."""
    world = World.random(0)
    optim = OptimSettings(lr=0.05, eps=1e-5, schedule="cosine")
    config = family(world, "reinforce++", whiten_advantages=True, rollouts=600, epochs=1, optim=optim)
    assert world.distance(trained(world, config)) <= 0.01


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_at_the_optimum_a_group_has_nothing_to_compare(estimator):
    """O2 without a critic: at pi* the return of every response, its KL included, is V*(root), so each response of a
    group earns the same and all advantages are 0; dividing by a spread of rounding does not make it signal."""
    world = World.random(0)
    config = family(world, estimator, missing_eos=MissingEosSettings(rule="off"), kl=KLSettings(coef=world.beta))
    config = config.model_copy(update={"rollout": RolloutSettings(prompts=3, responses_per_prompt=5)})
    trainer = PPOTrainer(config, TableModel(world.policy), None, TableModel(world.ref), seed=0)
    rollout = trainer.observe(*all_responses(DEPTH))
    torch.testing.assert_close(rollout.rewards.sum(1), world.values[0].expand(15), rtol=0, atol=1e-12)
    assert float(rollout.advantages.abs().max()) <= 1e-12


def on_the_bandit(beta: float, rollouts: int = 400, **changes) -> Tensor:
    """The policy (3,) where the trainer ends on the bandit: responses of one token, a, b or EOS."""
    table = torch.zeros(STATES, 3, dtype=torch.float64)
    table[0] = bandit.REF
    actor = TableModel(table)
    config = Config(
        estimator="grpo",
        rollouts=rollouts,
        rollout=RolloutSettings(prompts=64, responses_per_prompt=GROUP, max_response_tokens=1),
        epochs=1,
        micro_batch_size=256,
        whiten_advantages=False,
        missing_eos=MissingEosSettings(rule="off"),
        optim=OptimSettings(lr=0.1, eps=1e-5),
        **{"kl": KLSettings(coef=beta, estimator="k2"), **changes},
    )
    trainer = PPOTrainer(config, actor, None, TableModel(table), seed=0)
    engine, prompts = TableEngine(actor), [[PROMPT]] * config.responses
    for index in range(rollouts):
        samples = engine.generate(prompts, Sampling(1, 1.0, (EOS,), PAD, seed=index))
        trainer.improve(trainer.observe(join(prompts, samples, PAD, "cpu"), arm_scores(samples)), index)
    return actor.log_policy()[0].exp()


def arm_scores(samples: Samples) -> Tensor:
    """0, 1, 2 for a, b, EOS."""
    return at_the_end(bandit.SCORES[samples.token_ids[:, 0] - A], samples.lengths, 1)


def distance(policy: Tensor, other: Tensor) -> float:
    return float((policy - other).abs().sum() / 2)


def test_grpo_ends_at_its_documented_fixed_point():
    """GRPO divides by the spread of the group, so its KL weighs the less the less the scores of a prompt vary. Its
    fixed point, found by descent on the exact expected gradient over all groups of four, is not pi*."""
    beta = 1.0
    logits = bandit.REF

    def gradient(logits: Tensor) -> Tensor:
        draws = bandit.Draws(logits, GROUP)
        return draws.gradient(group_relative(draws.rewards(0.0), draws.mask, GROUP, True), kl_coef=beta)

    expected = bandit.descend(gradient, rate=0.5, steps=400, start=logits)
    found = on_the_bandit(beta)
    assert distance(found, expected) <= 0.01
    assert distance(found, bandit.tilted(bandit.SCORES, beta)) > 0.02


def test_dr_grpo_ends_at_its_documented_fixed_point():
    """Without the division the mean of all G responses scales the score's gradient by (G-1)/G and not that of the KL
    as a loss: pi = ref exp(score / beta') / Z with beta' = beta G/(G-1)."""
    beta = 0.5
    found = on_the_bandit(beta, divide_by_std=False)
    expected = bandit.tilted(bandit.SCORES, beta * GROUP / (GROUP - 1))
    assert distance(found, expected) <= 0.01
    assert distance(found, bandit.tilted(bandit.SCORES, beta)) > 0.02


def test_without_a_critic_none_is_held():
    """Neither values nor an optimiser for them exist."""
    world = World.random(0)
    trainer = PPOTrainer(family(world, "rloo"), TableModel(world.ref), None, TableModel(world.ref), seed=0)
    assert set(trainer.models) == set(trainer.optimisers) == {"actor"}
