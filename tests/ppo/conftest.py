"""Tiny real models for the tests of the trainer, the scorer and the loop, made once; and one thread for everything.

The tensors are tiny and the tests run in parallel: more threads would only wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from align.data.render import PAD_TOKEN, Renderer
from align.data.rows import Document
from align.job import Input
from align.models.load import load_policy, load_tokenizer, new_reward
from align.models.reward import normalise
from align.models.save import save_model
from stages.base.config import Config as BaseConfig
from stages.base.run import END, new_model, train_tokenizer

REWARD_MEAN, REWARD_STD = 0.3, 0.5
"""What the tiny reward models are normalised with: an offset that is not 0 must arrive everywhere."""

OTHER_TEMPLATE = (
    "{%- for message in messages -%}[{{ message['role'] }}]\n{{ message['content'] }}[end]{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[assistant]\n' }}{%- endif -%}"
)
"""A template of another family than that of `base`: other control tokens, a line break before the text, no trimming."""


@dataclass(frozen=True)
class Tiny:
    """Folders of models with random weights: policies of two architectures and two reward models."""

    llama: Input
    gpt2: Input
    """Its checkpoint asks for dropout everywhere."""
    dropout_llama: Input
    """`llama` with a checkpoint that asks for dropout in attention, where it is a number and not a module."""
    reward: Input
    """On the backbone of `llama`, with its tokenizer."""
    other_reward: Input
    """With another tokenizer and chat template."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Before everything else: a sum over another number of threads rounds differently, and runs are compared bit for
    bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    documents = [Document(text, "corpus") for text in ("a cat and a dog\n\n\n\n", "the dog sat on the cat") * 4]
    tokenizer = train_tokenizer(documents, 290, 64)
    base = BaseConfig(vocabulary=290, context=64, hidden=16, layers=2, heads=2)
    llama = new_model(base, tokenizer)
    vocabulary = tokenizer.get_vocab()
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.3,
            embd_pdrop=0.3,
            attn_pdrop=0.3,
            bos_token_id=None,
            eos_token_id=vocabulary[END],
            pad_token_id=vocabulary[PAD_TOKEN],
        )
    )
    other = train_tokenizer([Document("cats cats dogs dogs\n\n\n\n", "corpus")] * 4, 270, 64)
    other.add_special_tokens(
        {"eos_token": "[end]", "additional_special_tokens": ["[system]", "[user]", "[assistant]"]}  # type: ignore[arg-type]
    )
    other.chat_template = OTHER_TEMPLATE
    inputs = {}
    for name, model, its_tokenizer in (
        ("llama", llama, tokenizer),
        ("gpt2", gpt2, tokenizer),
        ("other", new_model(base, other), other),
    ):
        _spread(model)
        inputs[name] = _saved(model, its_tokenizer, root / name, "policy")
    llama.config.attention_dropout = 0.3
    inputs["dropout_llama"] = _saved(llama, tokenizer, root / "dropout_llama", "policy")
    for name, backbone in (("reward", "llama"), ("other_reward", "other")):
        its_tokenizer = load_tokenizer(inputs[backbone])
        reward = new_reward(inputs[backbone], its_tokenizer, torch.float32)
        normalise(reward, REWARD_MEAN, REWARD_STD)
        inputs[name] = _saved(reward, its_tokenizer, root / name, "reward model")
    return Tiny(**{name: inputs[name] for name in ("llama", "gpt2", "dropout_llama", "reward", "other_reward")})


@pytest.fixture(params=["llama", "gpt2"])
def policy_input(request, tiny: Tiny) -> Input:
    return getattr(tiny, request.param)


@pytest.fixture
def policy(policy_input: Input) -> torch.nn.Module:
    """A policy as a stage loads it, in train mode."""
    return load_policy(policy_input, load_tokenizer(policy_input), torch.float32).train()


def _spread(model: torch.nn.Module) -> None:
    """Makes the model's distributions uneven: with the usual initialisation all tokens are about as likely."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)


def _saved(model, tokenizer, folder: Path, kind: str) -> Input:
    save_model(model, tokenizer, folder, Renderer(tokenizer, "chat"))
    return Input(kind, str(folder), fingerprint=folder.name, source=folder.name)
