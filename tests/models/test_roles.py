"""Models in one role: heads that give the library's own logits, critics, and what is trained."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from align.errors import ArtifactError
from align.models.handover import probe_values
from align.models.load import load_tokenizer
from align.models.lora import add_lora
from align.models.packed import position_ids
from align.models.reward import score_sequences
from align.models.roles import causal_role, offloaded, reward_role
from align.models.value import critic_from_policy, critic_from_reward, shared_head
from align.recipe.training_settings import LoraSettings
from align.training.logprobs import response_states, state_logprobs, state_values
from tests.models.tiny import probes

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
ARCHITECTURES = {
    "Llama": SIZES,
    "Qwen2": SIZES,
    "GPT2": GPT2,
    "Gemma2": {**SIZES, "head_dim": 8, "final_logit_softcapping": 3.0},
    "Cohere": {**SIZES, "logit_scale": 0.3},
    "Granite": {**SIZES, "logits_scaling": 3.0},
    "HyperCLOVAX": {**SIZES, "logits_scaling": 0.3},
    "GPTNeoX": SIZES,
    "OPT": {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 8},
    "Bloom": {"vocab_size": 50, "hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5},
}
IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
MASK = torch.ones_like(IDS)


def new_model(name: str) -> nn.Module:
    """A random causal language model of an architecture."""
    torch.manual_seed(0)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    return getattr(transformers, f"{name}{head}")(config).eval()


def states_of(role, ids=IDS):
    mask = torch.ones_like(ids)
    return role.states(ids, mask, position_ids(mask))


@pytest.mark.parametrize("fp32_head", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_body_and_head_are_the_whole_model(name, fp32_head):
    """Soft caps, multipliers and divisors of the logits included, and for those that take no position ids: the same
    numbers as the library's own forward."""
    model = new_model(name)
    role = causal_role(model, fp32_head)
    states = states_of(role)
    assert states.shape == (2, 4, role.width)
    expected = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(role.head(states), expected, rtol=0, atol=1e-6)


def test_an_architecture_with_an_unknown_head_is_refused():
    """ModernBERT's decoder has a dense layer between body and output embedding: without the check it would be trained
    on other log-probabilities than its own."""
    config = transformers.ModernBertDecoderConfig(**{**SIZES, "cls_token_id": 3, "sep_token_id": 4})
    model = transformers.ModernBertDecoderForCausalLM(config)
    with pytest.raises(ArtifactError, match="ModernBertDecoderForCausalLM: this architecture does something"):
        causal_role(model)


def test_a_forward_that_a_trainer_has_wrapped_is_no_unknown_architecture():
    """Mixed-precision training leaves a rounding forward on the model, and the policy is sampled in between."""
    model = new_model("Llama")
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    assert causal_role(model).width == 16


@torch.no_grad()
def test_fp32_head_is_exact_in_a_bfloat16_run():
    """Under bfloat16 autocast the logits are those of float32 weights and the body's states; the plain head rounds
    them to 8 bits."""
    model = new_model("Llama")
    plain, exact = causal_role(model), causal_role(model, fp32_head=True)
    with torch.autocast("cpu", torch.bfloat16):
        states = states_of(plain)
        rounded, logits = plain.head(states), exact.head(states)
    assert (rounded.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(logits, nn.functional.linear(states.float(), model.lm_head.weight), rtol=0, atol=1e-6)
    assert float((rounded - logits).abs().max()) > 1e-3


@torch.no_grad()
def test_role_of_a_model_with_an_adapter(policy):
    """The adapter is at work in the body, and on an adapted output embedding too."""
    targets = ["q_proj", "down_proj", "lm_head"]
    lora = add_lora(policy.model, LoraSettings(rank=2, target_modules=targets)).eval()
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    expected = lora(input_ids=IDS, attention_mask=MASK).logits
    for fp32_head in (False, True):
        role = causal_role(lora, fp32_head)
        torch.testing.assert_close(role.head(states_of(role)), expected, rtol=0, atol=1e-5)


def test_what_is_trained_is_what_requires_a_gradient(policy):
    """A frozen model trains nothing; an adapted one its adapter only."""
    role = causal_role(policy.model)
    assert dict(role.named_parameters()).keys() == dict(policy.model.named_parameters()).keys()
    lora = add_lora(policy.model, LoraSettings(rank=2))
    assert all("lora_" in name for name, _ in causal_role(lora).named_parameters())
    lora.requires_grad_(False)
    assert not list(causal_role(lora).parameters())


def test_modes_are_left_as_they_were(policy):
    """The check at the start, and measuring in the middle of training, do not end training mode."""
    for mode in (True, False):
        policy.model.train(mode)
        role = causal_role(policy.model)
        assert policy.model.training is mode
        with role.evaluating():
            assert not policy.model.training and not torch.is_grad_enabled()
        assert policy.model.training is mode


def test_on_a_cpu_nothing_is_offloaded(policy):
    """The weights are where they should be already."""
    role = causal_role(policy.model)
    assert offloaded(role, torch.device("cpu")) is role


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_an_offloaded_model_is_on_the_device_while_it_is_active(policy):
    """Moved for its pass, nested ones too, and at home again after it, and after an error: the same tensors."""
    role = causal_role(policy.model.requires_grad_(False).to("cuda"))
    expected = role.head(states_of(role, IDS.to("cuda")))
    waiting = offloaded(role, torch.device("cuda"))
    at_home = {name: parameter.data_ptr() for name, parameter in policy.model.named_parameters()}
    assert waiting.device.type == "cpu"
    with waiting.active():
        with waiting.active():
            pass
        assert torch.equal(waiting.head(states_of(waiting, IDS.to("cuda"))), expected)
    with pytest.raises(KeyError), waiting.active():
        raise KeyError
    assert {name: parameter.data_ptr() for name, parameter in policy.model.named_parameters()} == at_home


@torch.no_grad()
def test_reward_role_is_the_library_s_score_plus_the_offset(scorer):
    """Read at the last token of each sequence, without padding, by the library's own forward."""
    sequences = probes(scorer.renderer, 4)
    role = reward_role(scorer.model.eval())
    ours = torch.cat([score_sequences(role, [ids], 0) for ids in sequences])
    assert ours.tolist() == pytest.approx(probe_values(scorer.model, sequences, is_reward=True), abs=1e-6)


@torch.no_grad()
def test_reward_head_is_in_float32_under_autocast(scorer):
    """In bfloat16 scores around 1 have steps of 0.008 and answers would tie."""
    role = reward_role(scorer.model.eval())
    with torch.autocast("cpu", torch.bfloat16):
        states = states_of(role)
        scores = role.head(states)
    weight, offset = scorer.model.score.weight, scorer.model.config.reward_offset
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, nn.functional.linear(states.float(), weight) + offset, rtol=0, atol=1e-6)


@torch.no_grad()
def test_critic_from_a_reward_model_starts_as_its_score(reward, scorer):
    """At every token the value is the score of the sequence up to there, to the bit: head, offset and backbone are
    the reward model's."""
    critic, role = critic_from_reward(reward, scorer.tokenizer, torch.float32), reward_role(scorer.model.eval())
    for ids in probes(scorer.renderer, 4):
        row = torch.tensor([ids])
        assert torch.equal(state_values(critic, states_of(critic, row)), role.head(states_of(role, row))[..., 0])
    assert {"head.weight", "head.bias"} < dict(critic.named_parameters()).keys()


def test_critic_from_a_policy_is_zero_and_learns(base):
    """For a reward without a model, or with another tokenizer. Head first, then backbone: the gradient of a zero head
    does not reach it."""
    critic = critic_from_policy(base, load_tokenizer(base), torch.float32)
    values = state_values(critic, states_of(critic))
    assert not values.detach().any()
    values.sum().backward()
    assert float(dict(critic.named_parameters())["head.weight"].grad.abs().sum()) > 0


def test_shared_head_is_the_only_thing_that_a_shared_critic_trains(policy):
    """It reads the actor's own states, at 0 first; its role names the head alone, its loss reaches the trunk through
    the states."""
    actor = causal_role(policy.model)
    critic = shared_head(actor)
    assert [name for name, _ in critic.named_parameters()] == ["head.weight", "head.bias"]
    with torch.no_grad():
        assert not state_values(critic, states_of(actor)).any()
        next(critic.parameters()).fill_(0.1)
    state_values(critic, states_of(critic)).square().sum().backward()
    assert float(policy.model.model.layers[0].mlp.up_proj.weight.grad.abs().sum()) > 0


def test_gradient_checkpointing_changes_no_gradient(policy):
    """Activations are computed twice, gradients are the same."""

    def gradients() -> dict[str, torch.Tensor]:
        policy.model.zero_grad()
        states = response_states(role, IDS, MASK, 3)
        logp, _ = state_logprobs(role, states[:, :-1], IDS[:, 1:], MASK[:, 1:].bool(), 1.0)
        logp.sum().backward()
        return {name: parameter.grad.clone() for name, parameter in role.named_parameters()}

    role = causal_role(policy.model.train())
    expected = gradients()
    calls: list[int] = []
    policy.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    role.checkpoint_gradients()
    found = gradients()
    assert len(calls) == 2  # once forward, once more in the backward pass
    assert all(torch.equal(found[name], expected[name]) for name in expected)
