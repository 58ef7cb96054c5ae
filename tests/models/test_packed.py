"""Passes without padding: the same states and gradients, and nothing computed at padding."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from align.models.lora import add_lora
from align.models.packed import NAME, Packing, pack, packs, position_ids
from align.models.roles import Role, causal_role
from align.recipe.training_settings import LoraSettings
from tests.models.test_roles import ARCHITECTURES, GPT2, SIZES, new_model

VALID = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]])
IDS = torch.arange(5, 23).view(3, 6)
PADDED = {"Gemma2", "Bloom"}
"""Attention that caps its scores or looks at a window only; attention that is not SDPA."""


def states(role: Role) -> torch.Tensor:
    """(N,H) of the tokens there are."""
    return role.states(IDS, VALID, position_ids(VALID))[VALID.bool()]


def gradients(role: Role) -> list[torch.Tensor]:
    """Of some function of all states, for every weight that has one."""
    weights = [weight for weight in role.parameters() if weight.requires_grad]
    total = (states(role) * torch.linspace(-1, 1, role.width)).square().sum()
    return [grad for grad in torch.autograd.grad(total, weights, allow_unused=True) if grad is not None]


def test_where_tokens_are():
    """Rows of 3, 6 and 2 tokens in a grid of 3 x 6: token 3, the first of the second row, is in slot 6."""
    packing = Packing.of(VALID.bool())
    assert (packing.rows, packing.width) == (3, 6)
    assert packing.slots.tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13]
    assert packing.sources[packing.slots].tolist() == list(range(11))
    tokens = torch.randn(1, 2, 11, 4)  # heads before tokens, as attention has them
    assert torch.equal(packing.tokens(packing.grid(tokens)), tokens.transpose(1, 2))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_states_and_gradients(name):
    """Whether an architecture can leave padding out is found out, not assumed; those that cannot go on as before."""
    model = new_model(name)
    role = causal_role(model)
    expected = states(role).detach(), gradients(role)
    assert pack(role.body) == packs(role.body) == (name not in PADDED)
    torch.testing.assert_close(states(role).detach(), expected[0], rtol=0, atol=2e-6)
    for found, before in zip(gradients(role), expected[1], strict=True):
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)


def test_with_adapters_and_recomputed_activations():
    """LoRA, and gradient checkpointing, which runs each layer once more in the backward pass."""
    model = add_lora(new_model("Llama"), LoraSettings(rank=4, alpha=8))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    role = causal_role(model)
    expected = gradients(role)
    assert pack(role.body)
    role.checkpoint_gradients()
    for found, before in zip(gradients(role), expected, strict=True):
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)


def test_nothing_is_computed_at_padding():
    """The feed-forward layers see one row of 11 tokens, where the padded batch has 18 places."""
    role = causal_role(new_model("Llama"))
    seen = []
    role.body.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    states(role)
    assert pack(role.body)
    states(role)
    assert seen[0] == (3, 6, 16) and seen[-1] == (1, 11, 16)


def test_attention_to_a_window_is_left_as_it_is():
    """A window of 4 tokens: three short rows could not tell, so the config decides."""
    model = MistralForCausalLM(MistralConfig(**{**SIZES, "sliding_window": 4}))
    assert not pack(model.model) and model.config._attn_implementation == "sdpa"
    wide = MistralForCausalLM(MistralConfig(**{**SIZES, "sliding_window": None}))
    assert pack(wide.model)


def test_another_attention_that_was_asked_for_stays():
    """Eager attention is not replaced behind the user's back."""
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    model.set_attn_implementation("eager")
    assert not pack(model.transformer) and model.config._attn_implementation == "eager"


def test_generation_and_the_saved_config_do_not_change(tmp_path):
    """Greedy tokens of left-padded prompts through the cache; and nothing of it is in config.json."""
    model = new_model("Llama")
    mask = VALID[:, :3].flip(1).sort(1).values
    arguments = {"input_ids": IDS[:, :3], "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**arguments)
    assert pack(causal_role(model).body)
    assert torch.equal(model.generate(**arguments), expected)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
