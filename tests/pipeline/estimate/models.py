"""Configs of small models of several families, and the shapes of a Llama by hand."""

from __future__ import annotations

from typing import Any

from align.pipeline.estimate.shapes import Shapes

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
_NO_GROUPS = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen2": _COMMON | {"tie_word_embeddings": True},
    "qwen3": _COMMON | {"head_dim": 32},
    "mistral": _COMMON | {"sliding_window": None},
    "gemma": _COMMON | {"head_dim": 16},
    "phi": _COMMON,
    "phi3": _COMMON | {"pad_token_id": 0},
    "gpt_neox": _NO_GROUPS,
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300, "n_positions": 128},
}
"""By model_type."""

BLOCK = [
    ("self_attn.q_proj", 8, 8),
    ("self_attn.k_proj", 8, 4),
    ("self_attn.v_proj", 8, 4),
    ("self_attn.o_proj", 8, 8),
    ("mlp.gate_proj", 8, 20),
    ("mlp.up_proj", 8, 20),
    ("mlp.down_proj", 20, 8),
]
TINY = Shapes(
    parameters=2 * (672 + 2 * 8) + 8 + 80,
    embedding=80,
    head=0,
    linears=[(f"model.layers.{layer}.{name}", inner, outer) for layer in range(2) for name, inner, outer in BLOCK],
    largest=160,
    hidden=8,
    layers=2,
    queries=8,
    keys=4,
    heads=2,
    vocabulary=10,
    context=64,
    norms=5 * 8,
    native_norm=False,
    activation_copies=1,
)
"""A Llama of two blocks: hidden 8, two heads of 4 and one for keys, feed-forward 20, ten words, embeddings tied. A
block has 64 + 32 + 32 + 64 + 3 * 160 = 672 weights in its linear layers and 2 * 8 in its norms."""
