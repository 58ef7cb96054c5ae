"""Random models that vLLM can run on a CPU: heads of 32 at least. Their distributions are far from even."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

PAD, EOS, END_OF_TURN = 0, 1, 2
VOCABULARY = 300
"""Not a multiple of 64, to which vLLM pads."""
CONTEXT = 192
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def make_model(folder: Path, kind: str, tied: bool, dtype: torch.dtype, lora: bool = False, seed: int = 0) -> Any:
    """A model that is also saved to `folder`; with `lora` an adapter on it that is not nothing."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(_config(kind, tied)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
            if name.endswith("_proj.bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    if lora:
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        )
    return model.eval()


def _config(kind: str, tied: bool) -> AutoConfig:
    ends = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    if kind == "gpt2":
        return GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=CONTEXT, **ends)
    return CONFIGS[kind](
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        **ends,
    )


def optimise(model: Any, steps: int, lr: float = 3e-3) -> None:
    """Some steps of AdamW on random tokens: every trained weight moves."""
    optimiser = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        ids = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
