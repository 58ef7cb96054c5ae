"""The mechanics of the trainer: what may change a result and what may not, how often it steps, and when it refuses.

Lookup tables in float64, so that "changes nothing" can mean 1e-12, and random responses of different lengths.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.errors import NumericError
from align.generation.engine import Samples
from align.recipe.training_settings import OptimSettings
from align.training.schedule import learning_rate_factor
from stages.ppo.config import Config
from stages.ppo.metrics import rollout_metrics
from stages.ppo.rewards import at_the_end
from stages.ppo.rollout import Responses, join
from stages.ppo.scorer import Scores
from stages.ppo.settings import ClipSettings, CriticSettings, KLSettings, MissingEosSettings, RolloutSettings
from stages.ppo.trainer import PPOTrainer
from tests.ppo.table_model import DEPTH, EOS, PAD, PROMPT, STATES, TableModel, World, complete_responses

ROWS = 8
PER_TOKEN = ("logp_old", "logp_ref", "values", "rewards", "advantages", "returns", "entropy")


def make_trainer(seed: int = 0, **changes) -> PPOTrainer:
    """Actor, critic and reference are three random tables. Steps are large, so that clipping decides somewhere."""
    world = World.random(0)
    generator = torch.Generator().manual_seed(1)
    actor = TableModel(world.ref + 0.5 * torch.randn(STATES, 3, generator=generator, dtype=torch.float64))
    critic = TableModel(torch.randn(STATES, 1, generator=generator, dtype=torch.float64))
    known = {
        "rollouts": 4,
        "rollout": RolloutSettings(prompts=ROWS, max_response_tokens=DEPTH),
        "epochs": 3,
        "minibatches": 2,
        "clip": ClipSettings(policy=0.05, value=0.05),
        "entropy_coef": 0.01,
        "optim": OptimSettings(lr=0.02, eps=1e-5),
        "critic": CriticSettings(optim=OptimSettings(lr=0.05, eps=1e-5)),
    }
    config = Config(**{**known, **changes})
    warmup = config.critic.warmup_rollouts or 0
    return PPOTrainer(config, actor, critic, TableModel(world.ref), seed=seed, warmup=warmup)


def make_responses(pad: int = PAD, left: int = 0, right: int = 0) -> tuple[Responses, Tensor]:
    """Eight of the complete responses after prompts of one to three tokens, and their token scores.

    `left` and `right` are further columns of padding; `pad` is the id that padding has.
    """
    picked = complete_responses()[::2]
    lengths = torch.tensor([len(response) for response in picked])
    ids = torch.full((len(picked), DEPTH), pad)
    for row, response in enumerate(picked):
        ids[row, : len(response)] = torch.tensor(response)
    samples = Samples(ids, lengths, torch.tensor([response[-1] == EOS for response in picked]))
    joined = join([[PROMPT] * (1 + row % 3) for row in range(len(picked))], samples, pad, "cpu")
    padding = (left, right)
    batch = Responses(
        torch.nn.functional.pad(joined.input_ids, padding, value=pad),
        torch.nn.functional.pad(joined.attention_mask, padding),
        joined.lengths,
        joined.finished,
        joined.width + right,
    )
    return batch, at_the_end(torch.linspace(-1, 2, len(picked), dtype=torch.float64), lengths, batch.width)


def tables(trainer: PPOTrainer) -> Tensor:
    """Actor and critic, side by side."""
    return torch.cat([*trainer.actor.parameters(), *trainer.critic.parameters()], 1).detach().clone()


def after_a_rollout(trainer: PPOTrainer, responses: Responses, scores: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The tables after one rollout, and all metrics of it."""
    rollout = trainer.observe(responses, scores)
    observed = rollout_metrics(rollout, trainer.kl_coef, Scores(scores, {"reward": scores.sum(1)}, None))
    improved = trainer.improve(rollout, 0)
    return tables(trainer), {**observed, **improved}


def assert_same(one: tuple[Tensor, dict[str, float]], other: tuple[Tensor, dict[str, float]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-12)
    assert one[1] == pytest.approx(other[1], abs=1e-12)


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_micro_batches_do_not_matter(micro):
    """Agg, row 66: sums are divided once, by the tokens of the whole optimiser step. Responses have one to three
    tokens, so a mean of the means of micro-batches would give other weights."""
    whole = after_a_rollout(make_trainer(minibatches=1, micro_batch_size=ROWS), *make_responses())
    split = after_a_rollout(make_trainer(minibatches=1, micro_batch_size=micro), *make_responses())
    assert_same(split, whole)
    assert not torch.equal(whole[0], tables(make_trainer()))


def test_columns_of_padding_do_not_matter():
    """M1, P1: weights and all metrics, entropy and clip fractions too, are the same with wider padding."""
    narrow = after_a_rollout(make_trainer(), *make_responses())
    for left, right in ((3, 0), (0, 3), (2, 4)):
        assert_same(after_a_rollout(make_trainer(), *make_responses(left=left, right=right)), narrow)


def test_pad_may_be_eos():
    """P2, row 3: masks come from lengths, so with PAD the same id as EOS every number is bit-identical."""
    ours, theirs = make_responses(), make_responses(pad=EOS)
    assert not torch.equal(ours[0].input_ids, theirs[0].input_ids)
    rollouts = [make_trainer().observe(*given) for given in (ours, theirs)]
    for name in (*PER_TOKEN, "scores"):
        assert torch.equal(getattr(rollouts[0], name), getattr(rollouts[1], name)), name
    one, other = (after_a_rollout(make_trainer(), *given) for given in (ours, theirs))
    assert torch.equal(one[0], other[0])
    assert one[1] == other[1]


@pytest.mark.parametrize("micro", [3, ROWS])
def test_order_of_rows_does_not_matter(micro):
    """Invariance: a permuted rollout has the same numbers row by row, whitening and micro-batches included."""
    responses, scores = make_responses()
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    shuffled = Responses(
        responses.input_ids[order],
        responses.attention_mask[order],
        responses.lengths[order],
        responses.finished[order],
        responses.width,
    )
    straight = make_trainer(micro_batch_size=micro).observe(responses, scores)
    permuted = make_trainer(micro_batch_size=micro).observe(shuffled, scores[order])
    for name in (*PER_TOKEN, "scores"):
        torch.testing.assert_close(getattr(permuted, name), getattr(straight, name)[order], rtol=0, atol=1e-12)


def test_masked_slots_are_zero():
    """M1, rows 26 and 27: whatever the models say of padding, an observed rollout holds 0 there."""
    responses, scores = make_responses(right=2)
    rollout = make_trainer().observe(responses, scores)
    for name in PER_TOKEN:
        assert not getattr(rollout, name)[~responses.mask].any(), name
    assert (rollout.entropy[responses.mask] > 0).all()


def test_returns_are_made_before_whitening():
    """W2, row 49: whitening changes the advantages and not the targets of the critic."""
    plain = make_trainer(whiten_advantages=False).observe(*make_responses())
    white = make_trainer(whiten_advantages=True).observe(*make_responses())
    assert torch.equal(plain.returns, white.returns)
    valid = white.advantages[white.responses.mask]
    assert float(valid.mean()) == pytest.approx(0, abs=1e-12)
    assert float(valid.square().mean()) == pytest.approx(1, abs=1e-6)


def test_a_repeated_batch_gives_the_same_update():
    """Agg: every row twice is the same mean over tokens, so one step leads to the same tables."""
    responses, scores = make_responses()
    twice = Responses(
        responses.input_ids.repeat(2, 1),
        responses.attention_mask.repeat(2, 1),
        responses.lengths.repeat(2),
        responses.finished.repeat(2),
        responses.width,
    )
    once = after_a_rollout(make_trainer(epochs=1, minibatches=1), responses, scores)
    doubled = after_a_rollout(make_trainer(epochs=1, minibatches=1), twice, scores.repeat(2, 1))
    torch.testing.assert_close(doubled[0], once[0], rtol=0, atol=1e-12)


def test_the_actor_and_the_critic_are_clipped_apart():
    """Row 77: each model's gradient is clipped to its own norm, and the norm before clipping is reported."""
    config = CriticSettings(optim=OptimSettings(lr=0.05, eps=1e-5, max_grad_norm=1e-3))
    trainer = make_trainer(critic=config, epochs=1, minibatches=1)
    norms = {}
    for name in ("actor", "critic"):
        model = getattr(trainer, name)
        trainer.optimisers[name].adamw.register_step_pre_hook(
            lambda *_, name=name, model=model: norms.update({name: float(model.table.grad.norm())})
        )
    metrics = trainer.improve(trainer.observe(*make_responses()), 0)
    assert metrics["val/grad_norm"] > 1e-2
    assert norms["critic"] == pytest.approx(1e-3, rel=1e-3)
    assert norms["actor"] == pytest.approx(metrics["policy/grad_norm"])


@pytest.mark.parametrize(("epochs", "minibatches", "micro"), [(1, 1, 8), (4, 1, 2), (3, 4, 1), (2, 2, 3)])
def test_number_of_optimiser_steps(epochs, minibatches, micro):
    """Cnt, row 68: rollouts x epochs x minibatches, counted at the optimisers; micro-batches do not add steps."""
    trainer = make_trainer(epochs=epochs, minibatches=minibatches, micro_batch_size=micro)
    counts = count_steps(trainer)
    for index in range(2):
        trainer.improve(trainer.observe(*make_responses()), index)
    assert counts == {"actor": 2 * epochs * minibatches, "critic": 2 * epochs * minibatches}
    assert trainer.num_steps == 2 * epochs * minibatches


def count_steps(trainer: PPOTrainer) -> dict[str, int]:
    """Counts the calls of `step` of either optimiser, as they happen."""
    counts = {"actor": 0, "critic": 0}
    for name, optimiser in trainer.optimisers.items():
        optimiser.adamw.register_step_post_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    return counts


def test_every_row_is_in_one_minibatch_of_every_epoch(monkeypatch):
    """Row 70: an epoch is a permutation of the rows, another one every epoch and every rollout, the same again with
    the same seed."""

    def epochs(seed: int) -> list[list[int]]:
        trainer = make_trainer(seed, minibatches=4, critic=CriticSettings(warmup_rollouts=2))
        rollout, rows = trainer.observe(*make_responses()), Responses.rows
        seen: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(Responses, "rows", lambda self, index: seen.extend(index.tolist()) or rows(self, index))
            for index in range(2):
                trainer.improve(rollout, index)
        return [seen[start : start + ROWS] for start in range(0, len(seen), ROWS)]

    orders = epochs(0)
    assert all(sorted(order) == list(range(ROWS)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders) == 2 * 3
    assert epochs(0) == orders != epochs(1)


@pytest.mark.parametrize("broken", ["actor", "critic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_changes_nothing(broken, value):
    """A NaN or infinite gradient of either model stops the run before either model is stepped."""
    trainer = make_trainer()
    rollout = trainer.observe(*make_responses())
    before, counts = tables(trainer), count_steps(trainer)
    getattr(trainer, broken).table.register_hook(lambda gradient: gradient * value)
    with pytest.raises(NumericError, match=f"the {broken}'s gradient norm"):
        trainer.improve(rollout, 0)
    assert torch.equal(tables(trainer), before)
    assert counts == {"actor": 0, "critic": 0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_score_changes_nothing(value):
    """The same for a reward model that says NaN or infinity of one response."""
    trainer = make_trainer()
    before = tables(trainer)
    responses, scores = make_responses()
    scores[int(responses.finished.nonzero()[0])] = value
    with pytest.raises(NumericError):
        trainer.improve(trainer.observe(responses, scores), 0)
    assert torch.equal(tables(trainer), before)


def test_warm_up_trains_only_the_critic():
    """Row 59: the actor is bit-identical after the warm-up rollouts, is not stepped, and learns from then on."""
    trainer = make_trainer(critic=CriticSettings(optim=OptimSettings(lr=0.05), warmup_rollouts=2))
    before, counts = tables(trainer), count_steps(trainer)
    for index in range(2):
        metrics = trainer.improve(trainer.observe(*make_responses()), index)
        assert metrics["lr"] == 0
        assert "policy/approxkl_avg" not in metrics
    now = tables(trainer)
    assert torch.equal(now[:, :3], before[:, :3])
    assert not torch.equal(now[:, 3:], before[:, 3:])
    assert counts == {"actor": 0, "critic": 12}
    assert "policy/approxkl_avg" in trainer.improve(trainer.observe(*make_responses()), 2)
    assert not torch.equal(tables(trainer)[:, :3], before[:, :3])


def test_seed_decides_the_minibatches():
    """Row 70: the same seed gives the same tables bit for bit, another seed others."""
    one, again, other = (after_a_rollout(make_trainer(seed), *make_responses())[0] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1, 0.8535533906, 0.5, 0.1464466094]),
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1, 0.5]),
        ("cosine", 0.5, [1 / 3, 2 / 3, 1, 0.5]),
        ("constant", 0.25, [1 / 2, 1, 1, 1]),
    ],
)
def test_learning_rate_by_rollout(schedule, warmup, factors):
    """Rows 74 and 75: the schedule goes by rollouts, whatever the epochs and minibatches, for each model by its own
    peak. By hand for four rollouts: linear (4-i)/4, cosine (1 + cos(pi i/4))/2; a warm-up of w steps (i+1)/(w+1)."""
    actor, critic = (OptimSettings(lr=lr, schedule=schedule, warmup=warmup) for lr in (0.02, 0.3))
    trainer = make_trainer(optim=actor, critic=CriticSettings(optim=critic))
    used: dict[str, list[float]] = {"actor": [], "critic": []}
    for name, optimiser in trainer.optimisers.items():
        optimiser.adamw.register_step_pre_hook(
            lambda given, *_, name=name: used[name].append(given.param_groups[0]["lr"])
        )
    reported = [trainer.improve(trainer.observe(*make_responses()), index)["lr"] for index in range(4)]
    steps = 6
    assert used["actor"] == pytest.approx([0.02 * factor for factor in factors for _ in range(steps)])
    assert used["critic"] == pytest.approx([0.3 * factor for factor in factors for _ in range(steps)])
    assert reported == pytest.approx(used["actor"][::steps])


@settings(deadline=None)
@given(
    st.sampled_from(["linear", "cosine", "constant"]),
    st.floats(0, 1),
    st.integers(1, 2000),
)
def test_learning_rate_is_positive_and_has_one_peak(schedule, warmup, total):
    """Row 75: no step is wasted at 0, the last one included; up during the warm-up, never up again after it."""
    optim = OptimSettings(lr=1.0, schedule=schedule, warmup=warmup)
    factors = [learning_rate_factor(optim, step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_a_minibatch_of_cut_responses_only_is_passed_over():
    """Row 11: with missing_eos mask, minibatches of single rows are steps where a response ended and nothing where it
    was cut; the others still count."""
    trainer = make_trainer(missing_eos=MissingEosSettings(rule="mask"), minibatches=ROWS, epochs=2)
    responses, scores = make_responses()
    ended = int(responses.finished.sum())
    assert 0 < ended < ROWS
    trainer.improve(trainer.observe(responses, scores), 0)
    assert trainer.num_steps == 2 * ended


def test_updates_stop_when_the_policy_has_moved_far_enough():
    """Row 78: the update that finds the policy beyond clip.approxkl is not made, nor any after it; the next rollout
    starts again. Without the limit all six are."""
    limited = make_trainer(clip=ClipSettings(approxkl=1e-3), optim=OptimSettings(lr=0.2, eps=1e-5))
    metrics = limited.improve(limited.observe(*make_responses()), 0)
    assert 1 <= metrics["policy/updates"] < 6
    assert limited.num_steps == metrics["policy/updates"]
    assert metrics["policy/approxkl_avg"] <= 1e-3
    before = limited.num_steps
    limited.improve(limited.observe(*make_responses()), 1)
    assert limited.num_steps > before
    free = make_trainer(optim=OptimSettings(lr=0.2, eps=1e-5))
    assert free.improve(free.observe(*make_responses()), 0)["policy/updates"] == 6


def test_an_adaptive_coefficient_moves_after_the_rollout_was_rewarded():
    """K, row 35: KL 12 at a target of 6, 8 episodes, horizon 160: 0.15 (1 + 0.2 * 8 / 160) = 0.1515 for the NEXT
    rollout."""
    trainer = make_trainer(kl=KLSettings(coef=0.15, target=6.0, horizon=160))
    rollout = trainer.observe(*make_responses())
    trainer.adapt(12.0, 0, 8)
    assert trainer.kl_coef == pytest.approx(0.1515)
    again = trainer.observe(*make_responses())
    kl = rollout.logp_old - rollout.logp_ref
    torch.testing.assert_close(again.rewards - rollout.rewards, -0.0015 * kl, rtol=0, atol=1e-12)


def test_a_constant_normaliser():
    """Dr. GRPO: the same sum divided by 8 responses of at most 3 tokens instead of by its tokens; one SGD-like look at
    the gradient tells."""
    norms = {}
    for normaliser in ("tokens", "constant"):
        trainer = make_trainer(normaliser=normaliser, epochs=1, minibatches=1)
        responses, scores = make_responses()
        norms[normaliser] = trainer.improve(trainer.observe(responses, scores), 0)["policy/grad_norm"]
        tokens = int(responses.lengths.sum())
    assert norms["constant"] == pytest.approx(norms["tokens"] * tokens / (ROWS * DEPTH))


def test_scores_are_clipped_before_the_rules():
    """Row 40: clipped to +-0.5, the clip of an outcome is that of its token; the rule's own -1 for a cut response is
    not clipped."""
    responses, scores = make_responses()
    rollout = make_trainer(score_clip=0.5).observe(responses, scores)
    expected = torch.where(responses.finished, scores.sum(1).clamp(-0.5, 0.5), -1)
    torch.testing.assert_close(rollout.scores, expected)
