"""Tiny models that are made here; one thread, because the tensors are tiny and the tests run in parallel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

PAD, EOS, END_OF_TURN = 0, 1, 2


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["llama", "gpt2"])
def model(request) -> torch.nn.Module:
    """A random model with distributions that are far from even, so that likeliest tokens win by a margin."""
    torch.manual_seed(0)
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        made = LlamaForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=40,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        made = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return made.eval()


def fixed_distribution(probabilities: list[float]) -> LlamaForCausalLM:
    """A model that gives every token its probability in every state, whatever came before."""
    config = LlamaConfig(
        vocab_size=len(probabilities),
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head = torch.nn.Linear(4, len(probabilities))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.tensor(probabilities).clamp(min=1e-30).log())
    return model


def counting(vocabulary: int) -> LlamaForCausalLM:
    """A model that is sure of one thing: token n is followed by n + 1, the last one by 0. Embeddings are one-hot, the
    block adds nothing, and the head turns the one by one place."""
    model = fixed_distribution([1.0] * vocabulary)
    model.model.embed_tokens = torch.nn.Embedding(vocabulary, vocabulary)
    model.model.layers = torch.nn.ModuleList()
    model.model.norm = torch.nn.Identity()
    model.config.num_hidden_layers = 0
    model.lm_head = torch.nn.Linear(vocabulary, vocabulary, bias=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary))
        model.lm_head.weight.copy_(100 * torch.eye(vocabulary).roll(1, 0))
    return model
