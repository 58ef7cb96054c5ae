"""One frozen base that plays four roles: each computes what a model of its own would, and trains nothing but itself."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from align.errors import ArtifactError
from align.evaluation.likelihood import response_logprob_sums
from align.generation.engine import Sampling
from align.generation.transformers_engine import TransformersEngine
from align.job import Input
from align.models.adapters import AdaptedBase
from align.models.handover import probe_values
from align.models.lora import add_lora
from align.models.opened import Opened, commit_policy, commit_reward, open_as_reward, open_policy, open_reward
from align.models.packed import position_ids
from align.models.reward import score_sequences
from align.models.roles import Role, causal_role, reward_role
from align.recipe.training_settings import LoraSettings
from align.records import committed_folder
from align.training.logprobs import response_states, state_logprobs, state_values
from tests.models.tiny import model_input, new_opened, probes, save_policy, trained_adapter

SETTINGS = LoraSettings(rank=4, alpha=8)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [10, 9, 8, 7, 6, 5]])
MASK = torch.ones_like(IDS)


@dataclass
class House:
    """All four roles on one base."""

    opened: Opened
    base: AdaptedBase
    actor: Role
    reference: Role
    reward: Role
    critic: Role

    def outputs(self) -> dict[str, Tensor]:
        """What each role says of some tokens."""
        roles = {"actor": self.actor, "reference": self.reference, "reward": self.reward, "critic": self.critic}
        return {name: output(role) for name, role in roles.items()}


@pytest.fixture
def house(policy: Opened, lora_reward: Input) -> House:
    """As PPO makes it: the critic starts from the reward model."""
    base = AdaptedBase(policy.model, SETTINGS)
    policy.model = base.model
    reference, reward = base.base_role(), base.reward("reward.1", lora_reward)
    return House(policy, base, base.actor(), reference, reward, base.critic("reward.1"))


@torch.no_grad()
def output(role: Role) -> Tensor:
    """Logits, scores or values of every token."""
    with role.active():
        return at_once(role)


def at_once(role: Role) -> Tensor:
    """The same of whatever is active."""
    return role.head(role.states(IDS, MASK, position_ids(MASK)))


def loss(role: Role) -> Tensor:
    """Something to train a role with."""
    states = response_states(role, IDS, MASK, 4)
    if role.head(states[:1, :1]).shape[-1] == 1:
        return state_values(role, states).sub(1).square().sum()
    return -state_logprobs(role, states[:, :-1], IDS[:, -4:], MASK[:, -4:].bool(), 1.0)[0].sum()


def train(role: Role, steps: int = 3) -> None:
    """A few optimiser steps."""
    optimiser = torch.optim.AdamW(list(role.parameters()), lr=0.05)
    for _ in range(steps):
        with role.active():
            loss(role).backward()
        optimiser.step()
        optimiser.zero_grad()


def test_the_reference_is_the_model_before_lora(base, house):
    """Bit-equal: before the actor's adapter is trained, and after, whatever else lies on the base."""
    alone = output(causal_role(open_policy(base, "auto").model))
    assert torch.equal(output(house.reference), alone)
    assert torch.equal(output(house.actor), alone)  # B = 0
    train(house.actor)
    assert torch.equal(output(house.reference), alone)
    assert not torch.equal(output(house.actor), alone)


@pytest.mark.parametrize("trained", ["actor", "critic"])
def test_training_one_role_moves_no_other(house, trained):
    """Actor and critic have their own adapters; reward and reference none that is trained."""
    before = house.outputs()
    train(getattr(house, trained))
    for name, after in house.outputs().items():
        assert torch.equal(after, before[name]) is (name != trained), name


def test_the_reward_is_that_of_the_merged_model(house, lora_reward):
    """Base + adapter + head + offset against the whole model that the reward stage saved: equal to the rounding of the
    merge, 1e-5."""
    whole = reward_role(open_reward(lora_reward, "auto").model)
    torch.testing.assert_close(output(house.reward), output(whole), rtol=0, atol=1e-5)
    sequences = probes(house.opened.renderer)
    with torch.no_grad():
        ours, theirs = (score_sequences(role, sequences, 0) for role in (house.reward, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert float(ours.std()) > 0.1


def test_the_critic_starts_as_the_reward(house):
    """At the last token of a response, and at every other, the value is the score, to the bit."""
    assert torch.equal(output(house.critic), output(house.reward))


def test_a_critic_that_starts_from_nothing(policy):
    """No reward model on this base: 0 everywhere, on states of the base; and it learns."""
    base = AdaptedBase(policy.model, SETTINGS)
    critic = base.critic(None)
    assert not output(critic).any()
    train(critic)
    assert output(critic).all()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["actor", "critic"])
def test_gradients_reach_the_role_only(house, trained, checkpointing):
    """With activations recomputed in the backward pass too: every parameter of the role gets a gradient (A only where B
    is not 0), and nothing else in memory does. The gradients with and without recomputation are the same."""
    role: Role = getattr(house, trained)
    train(house.actor, 1)  # B = 0 would hide the gradient of A
    own = dict(role.named_parameters())
    with role.active():
        loss(role).backward()
    expected = {name: parameter.grad.clone() for name, parameter in own.items()}
    if checkpointing:
        for parameter in own.values():
            parameter.grad = None
        role.checkpoint_gradients()
        with role.active():
            loss(role).backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in own.values())
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in own.items())
    everything = [*house.base.model.parameters(), *house.critic.parameters()]
    others = [parameter for parameter in everything if not any(parameter is one for one in own.values())]
    assert others and all(parameter.grad is None for parameter in others)


def test_what_is_trained_is_fixed_once(house):
    """Switching between forward and backward does not touch it, unlike peft's own set_adapter."""
    before = {name: parameter.requires_grad for name, parameter in house.base.model.named_parameters()}
    trained = {name for name, is_trained in before.items() if is_trained}
    adapters = [*house.actor.named_parameters(), *house.critic.named_parameters()]
    assert trained | {"head.weight", "head.bias"} == {name for name, _ in adapters}
    assert not [*house.reference.named_parameters(), *house.reward.named_parameters()]
    house.outputs()
    assert {name: parameter.requires_grad for name, parameter in house.base.model.named_parameters()} == before


def test_switching_is_re_entrant_and_survives_an_error(house):
    """A role inside another: on leaving, the outer one computes again; after an error the actor, as at rest."""
    train(house.actor)
    expected = house.outputs()
    with house.reference.active():
        with house.critic.active():
            assert torch.equal(at_once(house.critic), expected["critic"])
        assert torch.equal(at_once(house.reference), expected["reference"])
    with pytest.raises(KeyError), house.reward.active():
        raise KeyError
    assert torch.equal(at_once(house.actor), expected["actor"])


def test_generation_samples_the_actor(house, base):
    """At rest the model samples from the actor: a trained actor answers what it was trained to, and the base alone,
    which has not moved, answers as before."""
    prompts = [[5, 6, 7]] * 4
    sampling = Sampling(4, 0.01, (1,), 0, seed=0)
    before = TransformersEngine(open_policy(base, "auto").model).generate(prompts, sampling).rows()
    engine = TransformersEngine(house.base.model)
    assert engine.generate(prompts, sampling).rows() == before
    ids = torch.tensor([[5, 6, 7, 11, 12, 13, 14]])
    optimiser = torch.optim.AdamW(list(house.actor.parameters()), lr=0.02)
    for _ in range(60):
        states = response_states(house.actor, ids, torch.ones_like(ids), 4)
        logp, _ = state_logprobs(house.actor, states[:, :-1], ids[:, 3:], torch.ones(1, 4, dtype=torch.bool), 1.0)
        (-logp.sum()).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert engine.generate(prompts, sampling).rows() == [[11, 12, 13, 14]] * 4 != before
    with house.reference.active():
        assert engine.generate(prompts, sampling).rows() == before


def test_committing_merges_and_keeps_the_actor_only(house, base, tmp_path):
    """Measured first, committed then: the artifact is base + actor, checked by the hand-over; neither reward nor critic
    is in it, and the adapter beside it, put on the base again, is the actor."""
    train(house.actor)
    train(house.critic)
    rows = probes(house.opened.renderer)
    measured = response_logprob_sums(house.reference, [row[:4] for row in rows], [row[4:] for row in rows], 0)
    expected = probe_values(house.base.model, rows, is_reward=False)
    folder = tmp_path / "model"
    effective, result = commit_policy(committed_folder(folder), house.base.model, house.opened, rows)
    assert result["largest_difference"] < 1e-4
    assert probe_values(effective, rows, is_reward=False) == pytest.approx(expected, abs=1e-4)
    loaded = open_policy(model_input(folder), "auto").model
    assert probe_values(loaded, rows, is_reward=False) == pytest.approx(expected, abs=1e-4)
    assert not any("lora" in key for key in load_file(folder / "model.safetensors"))
    assert sorted(path.name for path in (folder / "adapter").iterdir() if path.is_dir()) == []
    again = AdaptedBase(open_policy(base, "auto").model, SETTINGS)
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    saved = {name.replace(".weight", ".default.weight"): weight for name, weight in weights.items()}
    assert saved.keys() == dict(again.actor().named_parameters()).keys()
    again.model.load_state_dict(saved, strict=False)
    assert probe_values(again.model, rows, is_reward=False) == pytest.approx(expected, abs=1e-4)
    alone = causal_role(open_policy(base, "auto").model)
    unmoved = response_logprob_sums(alone, [row[:4] for row in rows], [row[4:] for row in rows], 0)
    assert measured == unmoved


def test_a_frozen_base_without_an_actor(base, lora_reward):
    """All weights of the actor are trained elsewhere; the frozen reference plays the reward as well. At rest it is
    itself, before the first adapter lies on it and after; nothing in it is trained."""
    alone = output(causal_role(open_policy(base, "auto").model))
    frozen = AdaptedBase(open_policy(base, "auto").model, None)
    reference = frozen.base_role()
    assert torch.equal(output(reference), alone)
    reward = frozen.reward("reward", lora_reward)
    whole = reward_role(open_reward(lora_reward, "auto").model)
    torch.testing.assert_close(output(reward), output(whole), rtol=0, atol=1e-5)
    assert torch.equal(output(reference), alone)
    assert torch.equal(at_once(reference), alone)
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())


def test_all_roles_on_a_base_in_4_bits(base, tmp_path):
    """QLoRA: a reward model trained on the NF4 base plays on the policy's NF4 base, which is the same to the bit, and
    is the merged model that its stage saved; actor and reference start equal, the critic as the reward. On the same
    base in full it is refused: that is another model."""
    opened = open_as_reward(base, "auto", quantise="nf4")
    lora = trained_adapter(opened.model, is_reward=True)
    reward = model_input(tmp_path / "model", "reward")
    commit_reward(committed_folder(tmp_path / "model"), lora, opened, probes(opened.renderer))
    house = AdaptedBase(open_policy(base, "auto", quantise="nf4").model, SETTINGS)
    role = house.reward("reward", reward)
    whole = reward_role(open_reward(reward, "auto").model)
    torch.testing.assert_close(output(role), output(whole), rtol=0, atol=1e-5)
    assert torch.equal(output(house.critic("reward")), output(role))
    actor, reference = house.actor(), house.base_role()
    assert torch.equal(output(actor), output(reference))
    train(actor)
    assert not torch.equal(output(actor), output(reference))
    with pytest.raises(ArtifactError, match="its adapter on this base"):
        AdaptedBase(open_policy(base, "auto").model, SETTINGS).reward("reward", reward)


def test_two_reward_models_on_one_base(house, lora_reward, base, tmp_path):
    """An ensemble: each has its own adapter, head and offset; another rank and fewer target modules do no harm."""
    opened = open_as_reward(base, "auto")
    lora = add_lora(opened.model, LoraSettings(rank=2, target_modules=["q_proj"]), is_reward=True).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    commit_reward(committed_folder(tmp_path / "model"), lora, opened, probes(opened.renderer))
    first = output(house.reward)
    second = house.base.reward("reward.2", model_input(tmp_path / "model", "reward"))
    whole = reward_role(open_reward(model_input(tmp_path / "model", "reward"), "auto").model)
    torch.testing.assert_close(output(second), output(whole), rtol=0, atol=1e-5)
    assert torch.equal(output(house.reward), first)
    assert not torch.equal(output(second), first)


def test_a_reward_adapter_on_another_base_is_refused(lora_reward, tmp_path):
    """The same architecture with other weights: the adapter fits, its scores do not, and that is noticed."""
    other = save_policy(new_opened(seed=9), tmp_path / "other")
    base = AdaptedBase(open_policy(other, "auto").model, SETTINGS)
    with pytest.raises(ArtifactError, match=r"start, its adapter on this base: .* differs from the model"):
        base.reward("reward", lora_reward)


def test_a_reward_adapter_on_another_architecture_is_refused(lora_reward):
    """Nowhere to put it: the reason is said in one line."""
    for settings in (SETTINGS, None):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64))
        with pytest.raises(ArtifactError, match=r"start: .*adapter is no reward adapter on this base: "):
            AdaptedBase(model, settings).reward("reward", lora_reward)


@pytest.mark.parametrize("fault", ["a layer missing", "no head", "other scores", "no probes", "no adapter"])
def test_a_damaged_reward_adapter_is_refused(policy, lora_reward, tmp_path, fault):
    """Whatever is lost on the way is noticed before a single response is scored."""
    folder = Path(shutil.copytree(lora_reward.path, tmp_path / "model"))
    path = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    if fault == "a layer missing":
        weights = {name: weight for name, weight in weights.items() if "layers.1.mlp.up_proj" not in name}
    elif fault == "no head":
        weights = {name: weight for name, weight in weights.items() if "score" not in name}
    elif fault == "other scores":
        weights = {name: weight * 1.5 for name, weight in weights.items()}
    elif fault == "no probes":
        (folder / "probes.json").unlink()
    save_file(weights, path)
    if fault == "no adapter":
        shutil.rmtree(folder / "adapter")
    with pytest.raises(ArtifactError, match=r"^start.*adapter"):
        AdaptedBase(policy.model, SETTINGS).reward("reward", model_input(folder, "reward"))


def test_dropout_of_adapters_is_off(policy):
    """Two passes of the same weights in train mode agree: otherwise the first ratio would not be 1."""
    base = AdaptedBase(policy.model, LoraSettings(rank=4, alpha=8, dropout=0.5))
    actor = base.actor()
    train(actor)
    assert base.model.training
    assert torch.equal(output(actor), output(actor))
