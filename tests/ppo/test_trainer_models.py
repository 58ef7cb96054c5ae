"""The trainer with real models, as a stage loads them: tiny Llama- and GPT-2-shaped policies in train mode."""

from __future__ import annotations

import copy

import pytest
import torch

from align.data.render import Renderer
from align.errors import NumericError
from align.generation.engine import Samples
from align.job import Input
from align.models.adapters import AdaptedBase
from align.models.load import load_policy, load_tokenizer
from align.models.opened import open_policy
from align.models.roles import causal_role
from align.models.value import critic_from_reward, shared_head
from align.recipe.training_settings import LoraSettings, OptimSettings
from stages.ppo.alarms import check_starts_at_reference
from stages.ppo.config import Config
from stages.ppo.metrics import rollout_metrics
from stages.ppo.rewards import at_the_end
from stages.ppo.rollout import Responses, join
from stages.ppo.scorer import Scores
from stages.ppo.settings import CriticSettings, RolloutSettings
from stages.ppo.trainer import PPOTrainer
from tests.ppo.conftest import Tiny

ROWS, WIDTH = 8, 7


def make_trainer(policy: torch.nn.Module, tiny: Tiny, **changes) -> PPOTrainer:
    """The policy, a frozen copy of it as the reference, and the critic that the tiny reward model gives."""
    dtype = next(policy.parameters()).dtype
    critic = critic_from_reward(tiny.reward, load_tokenizer(tiny.reward), torch.float32)
    critic.module.to(dtype)
    optim = OptimSettings(lr=1e-3, eps=1e-5)
    known = {
        "rollouts": 4,
        "rollout": RolloutSettings(prompts=ROWS, max_response_tokens=WIDTH),
        "epochs": 1,
        "micro_batch_size": 4,
        "optim": optim,
        "critic": CriticSettings(optim=optim),
    }
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    roles = (causal_role(policy), critic, causal_role(reference))
    return PPOTrainer(Config(**{**known, **changes}), *roles, seed=0)


def make_responses(policy_input: Input, pad: int | None = None) -> tuple[Responses, torch.Tensor]:
    """Random tokens: prompts of one to five, responses of one to seven, the last row cut."""
    renderer = Renderer(load_tokenizer(policy_input))
    pad = renderer.pad_id if pad is None else pad
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([1 + row % WIDTH for row in range(ROWS - 1)] + [WIDTH])
    finished = torch.arange(ROWS) < ROWS - 1
    ids = torch.randint(5, len(renderer.tokenizer), (ROWS, WIDTH), generator=generator)
    ids[finished, lengths[finished] - 1] = renderer.end_of_turn
    ids = torch.where(torch.arange(WIDTH) < lengths[:, None], ids, pad)
    prompts = [
        torch.randint(5, len(renderer.tokenizer), (1 + row % 5,), generator=generator).tolist() for row in range(ROWS)
    ]
    responses = join(prompts, Samples(ids, lengths, finished), pad, "cpu")
    return responses, at_the_end(torch.linspace(-1, 1, ROWS), lengths, responses.width)


def weights(trainer: PPOTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for role in trainer.models.values() for parameter in role.parameters()]


@pytest.mark.parametrize("policy_input", ["llama", "gpt2", "dropout_llama"], indirect=True)
def test_first_ratio_is_one(policy, policy_input, tiny):
    """R1, rows 22 and 23: in train mode, with other rows in a micro-batch than when the old log-probabilities were
    taken, every first ratio is 1 up to rounding, although two of the checkpoints ask for dropout. One epoch of one
    minibatch: the averages are those of the first."""
    assert policy.training
    trainer = make_trainer(policy, tiny)
    metrics = trainer.improve(trainer.observe(*make_responses(policy_input)), 0)
    assert metrics["val/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["val/ratio_var"] == pytest.approx(0, abs=1e-5)
    assert metrics["policy/approxkl_avg"] < 1e-10
    assert metrics["policy/clipfrac_avg"] == 0


def test_dropout_stops_the_run(policy, policy_input, tiny):
    """R1: with dropout switched on again the check of the first ratio refuses, and nothing was updated."""
    trainer = make_trainer(policy, tiny)
    if hasattr(policy.config, "attn_pdrop"):
        for module in policy.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
    else:
        for layer in policy.model.layers:
            layer.self_attn.attention_dropout = 0.3
    torch.manual_seed(0)
    rollout = trainer.observe(*make_responses(policy_input))
    before = weights(trainer)
    with pytest.raises(NumericError, match="is dropout on"):
        trainer.improve(rollout, 0)
    assert all(torch.equal(now, then) for now, then in zip(weights(trainer), before, strict=True))


def test_kl_to_a_copied_reference_is_exactly_zero(policy, policy_input, tiny):
    """R2, row 24: the actor in train mode and its frozen copy in eval mode agree bit for bit at step 0."""
    trainer = make_trainer(policy, tiny)
    responses, scores = make_responses(policy_input)
    rollout = trainer.observe(responses, scores)
    assert torch.equal(rollout.logp_old, rollout.logp_ref)
    metrics = rollout_metrics(rollout, trainer.kl_coef, Scores(scores, {"reward": scores.sum(1)}, None))
    assert metrics["objective/kl"] == metrics["objective/kl_k3"] == metrics["objective/kl_se"] == 0
    check_starts_at_reference(0.0, trainer.rounding)


def test_another_reference_is_noticed(tiny):
    """R2, row 84: a reference that is not the model the policy starts from has a KL far beyond the bound."""
    policy = load_policy(tiny.llama, load_tokenizer(tiny.llama), torch.float32)
    trainer = make_trainer(policy, tiny)
    with torch.no_grad():
        next(trainer.reference.module.parameters()).mul_(1.05)
    rollout = trainer.observe(*make_responses(tiny.llama))
    with pytest.raises(NumericError, match="differs from its reference"):
        check_starts_at_reference(float((rollout.logp_old - rollout.logp_ref).abs().max()), trainer.rounding)


def test_micro_batches_do_not_matter(policy_input, tiny):
    """Row 66, P1: micro-batches of 1, 2, 4 and 8 rows have other paddings on both sides, and lead to the same weights
    up to rounding: positions count from a row's first token, and every sum is divided once."""
    results = []
    for micro in (1, 2, 4, 8):
        policy = load_policy(policy_input, load_tokenizer(policy_input), torch.float64).train()
        trainer = make_trainer(policy, tiny, micro_batch_size=micro, epochs=2, minibatches=1)
        trainer.improve(trainer.observe(*make_responses(policy_input)), 0)
        results.append(weights(trainer))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_pad_may_be_eos(policy_input, tiny):
    """P2, row 3: with the padding's id that of EOS, log-probabilities, values, advantages and the updated weights are
    bit-identical."""
    tokenizer = load_tokenizer(policy_input)
    renderer = Renderer(tokenizer)
    results = []
    for pad in (renderer.pad_id, renderer.end_of_turn):
        trainer = make_trainer(load_policy(policy_input, tokenizer, torch.float32).train(), tiny)
        rollout = trainer.observe(*make_responses(policy_input, pad))
        trainer.improve(rollout, 0)
        seen = [rollout.logp_old, rollout.values, rollout.advantages, rollout.entropy]
        results.append(seen + weights(trainer))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_old_logprobs_are_those_of_a_forward_without_padding(policy, policy_input, tiny):
    """P1, N3, row 25: each row alone, without padding and without positions given, through the library's forward."""
    responses, scores = make_responses(policy_input)
    rollout = make_trainer(policy, tiny).observe(responses, scores)
    for row, length in enumerate(responses.lengths.tolist()):
        ids = responses.input_ids[row][responses.attention_mask[row].bool()][None]
        logp = policy(input_ids=ids).logits.log_softmax(-1)[0, -length - 1 : -1]
        expected = logp.gather(-1, ids[0, -length:, None])[:, 0]
        torch.testing.assert_close(rollout.logp_old[row, :length], expected.detach(), rtol=0, atol=2e-5)


def gradients(trainer: PPOTrainer, responses: Responses, scores: torch.Tensor) -> list[torch.Tensor]:
    """Actor's and critic's, as the optimisers get them in the only step of a rollout."""
    seen: list[torch.Tensor] = []
    for optimiser in trainer.optimisers.values():
        optimiser.adamw.register_step_pre_hook(
            lambda given, *_: seen.extend(
                weight.grad.clone() for group in given.param_groups for weight in group["params"]
            )
        )
    trainer.improve(trainer.observe(responses, scores), 0)
    return seen


@pytest.mark.parametrize("critic", ["adapter", "shared-head"])
def test_micro_batches_do_not_matter_to_roles_on_one_base(critic, tiny):
    """Row 66: on one base, actor, critic and reference switch adapters within every micro-batch; the gradients are the
    same for 1, 2, 4 and 8 rows, and for any budget of tokens."""
    sizes = [{"micro_batch_size": rows} for rows in (8, 1, 2, 4)]
    budgets = [{"micro_batch_tokens": tokens} for tokens in (20, 31)]
    lora = LoraSettings(rank=4, alpha=8)
    results = []
    for changes in [*sizes, *budgets]:
        torch.manual_seed(0)
        opened = open_policy(tiny.llama, "chat")
        base = AdaptedBase(opened.model, lora)
        actor = base.actor()
        value = base.critic(None) if critic == "adapter" else shared_head(actor)
        settings = CriticSettings(kind=critic, optim=OptimSettings(lr=1e-3, max_grad_norm=1e9))
        config = Config(
            rollouts=4,
            rollout=RolloutSettings(prompts=ROWS, max_response_tokens=WIDTH),
            epochs=1,
            lora=lora,
            optim=OptimSettings(lr=1e-3, max_grad_norm=1e9),
            critic=settings,
            **changes,
        )
        with torch.no_grad():  # B is 0 in a fresh adapter, and A would get no gradient
            generator = torch.Generator().manual_seed(3)
            for parameter in actor.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        trainer = PPOTrainer(config, actor, value, base.base_role(), seed=0)
        results.append(gradients(trainer, *make_responses(tiny.llama)))
    assert max(float(gradient.abs().max()) for gradient in results[0]) > 1e-3
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
