"""The models of rollout.py: two shapes with seeded random weights, in which stop tokens are as likely as one says.

The first place of every embedding, which is input and output in one, is one and the same number. So the first place of
a last hidden state is nearly the same in every context, and a token that has more there is likelier by a constant.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
PAD, NEVER, STOPS = 0, 1, (2, 3, 4, 5)
"""Padding; a token that is not produced in ages of the universe; what ends a response."""
IDS = {"pad_token_id": PAD, "eos_token_id": STOPS[0], "bos_token_id": None}
FIRST = 6
"""The first of the tokens that prompts are made of."""
NEVER_NATS = 60.0
SHORTEST, LONGEST = 8, 24
"""Tokens of prompts."""
SEED = 0


@dataclass(frozen=True)
class Subject:
    """A model to be measured with, and how long its responses may be."""

    name: str
    config: PretrainedConfig
    max_tokens: int
    """Of a response."""
    mean_tokens: float
    """Of a response that ends by itself, about."""


def subjects() -> list[Subject]:
    """The demo's base, and one of the Qwen2 family with a large vocabulary."""
    base = yaml.safe_load(DEMO.read_text(encoding="utf-8"))["base"]
    tiny = LlamaConfig(
        vocab_size=base["vocabulary"],
        hidden_size=base["hidden"],
        intermediate_size=4 * base["hidden"],
        num_hidden_layers=base["layers"],
        num_attention_heads=base["heads"],
        max_position_embeddings=base["context"],
        initializer_range=0.05,
        tie_word_embeddings=True,
        **IDS,
    )
    small = Qwen2Config(
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **IDS,
    )
    return [Subject("tiny", tiny, 96, 12), Subject("small", small, 32, 4)]


@torch.no_grad()
def make_model(config: PretrainedConfig, mean_tokens: float) -> Any:
    """A model with random weights whose responses end with one of STOPS, after about so many tokens on average."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0  # layers leave the first place as it is
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0] = config.initializer_range * math.sqrt(config.hidden_size)
    ids = torch.randint(FIRST, config.vocab_size, (32, LONGEST))
    states = model.model(ids).last_hidden_state
    now = float(model.lm_head(states).softmax(-1)[..., list(STOPS)].sum(-1).mean())
    nat = 1 / float(states[..., 0].mean())
    embeddings[list(STOPS), 0] += nat * (logit(1 / mean_tokens) - logit(now))
    embeddings[[PAD, NEVER], 0] -= nat * NEVER_NATS
    return model


def logit(probability: float) -> float:
    """Nats by which tokens of this probability together are above all others together."""
    return math.log(probability / (1 - probability))


def make_prompts(vocabulary: int, count: int, seed: int) -> Iterator[list[int]]:
    """Random ids, from SHORTEST to LONGEST of them."""
    drawn = random.Random(seed)
    for _ in range(count):
        yield [drawn.randrange(FIRST, vocabulary) for _ in range(drawn.randint(SHORTEST, LONGEST))]
