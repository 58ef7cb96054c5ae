"""The process that counts for `align plan --memory`: `python -m align.shapes`, questions as JSON in, answers out.

A model is built from its config on torch's meta device, which holds shapes and no numbers: whatever its size, that
takes no memory and reads no weights. Rows of data are rendered with the tokenizer of a local folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from align.data.load import load
from align.data.render import Renderer
from align.data.tokenizer import tokenizer_of
from align.recipe.data_settings import DataSettings, Role
from align.training.rows import TokenRow, demonstration_row, judgement_row, preference_row

SAMPLED = 1000
"""Rows whose tokens are counted; of longer data every n-th."""
GELU_NEW_COPIES = 5
"""Tensors that GPT-2's activation, a polynomial and a tanh written out in Python, keeps for its backward pass."""


def main() -> None:
    """Answers a question a line, with null where there is no answer."""
    for line in sys.stdin:
        question = json.loads(line)
        with redirect_stdout(sys.stderr):  # libraries and code of a model may print
            answer = _answered(question)
        print(json.dumps(answer), flush=True)


def _answered(question: dict[str, Any]) -> Any:
    try:
        return model_shapes(question["config"]) if "config" in question else row_lengths(**question)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return None


def model_shapes(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of align.pipeline.estimate.shapes.Shapes for the content of a config.json."""
    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(made)
    _refuse_experts(model)
    text, embedding, head = made.get_text_config(), model.get_input_embeddings().weight, model.get_output_embeddings()
    body = [(name, module) for name, module in model.named_modules() if module is not head]
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    linears = [[name, *_sizes(module)] for name, module in body if isinstance(module, nn.Linear | Conv1D)]
    norms = [(name, module) for name, module in body if "Norm" in type(module).__name__]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "embedding": embedding.numel(),
        "head": 0 if head.weight is embedding else sum(parameter.numel() for parameter in head.parameters()),
        "linears": linears,
        "largest": max(parameter.numel() for parameter in model.parameters()),
        "hidden": text.hidden_size,
        "layers": text.num_hidden_layers,
        "queries": heads * width,
        "keys": (getattr(text, "num_key_value_heads", None) or heads) * width,
        "heads": heads,
        "vocabulary": head.weight.shape[0],
        "context": getattr(text, "max_position_embeddings", None),
        "norms": sum(_normalised(name, module, width, text) for name, module in norms),
        "native_norm": any(isinstance(module, nn.LayerNorm) for _, module in norms),
        "activation_copies": GELU_NEW_COPIES if _activation(text) == "gelu_new" else 1,
    }


def _refuse_experts(model: Any) -> None:
    """Raises ValueError for a mixture of experts: which weights a token meets is not in the shapes."""
    in_layers = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | Conv1D))
    embedded = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    if in_layers + embedded < 0.9 * sum(parameter.numel() for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__}: most of its weights are in no linear layer")


def _activation(config: Any) -> str | None:
    return getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)


def _sizes(module: Any) -> tuple[int, int]:
    """Features in and out."""
    inner, outer = module.weight.shape
    return (inner, outer) if isinstance(module, Conv1D) else (outer, inner)


def _normalised(name: str, module: Any, width: int, config: Any) -> int:
    """Numbers of one token that a norm works on. A norm of each head has one weight for all heads."""
    size = module.weight.numel() if getattr(module, "weight", None) is not None else config.hidden_size
    if size != width or width == config.hidden_size:
        return size
    return size * (config.num_key_value_heads if "k_" in name.rpartition(".")[2] else config.num_attention_heads)


PARTS: dict[Role, tuple[Callable[[Renderer, Any], TokenRow], tuple[str, ...]]] = {
    Role.DEMONSTRATIONS: (demonstration_row, ("input_ids",)),
    Role.PREFERENCES: (preference_row, ("prompt_ids", "chosen_ids", "rejected_ids")),
    Role.JUDGEMENTS: (judgement_row, ("prompt_ids", "response_ids")),
}
"""How rows become tokens, and in which parts."""


def row_lengths(folder: str, trust_remote_code: bool, data: dict[str, Any], role: str) -> list[list[int]]:
    """Tokens of each part of the sampled rows, as in PARTS; prompts are one part."""
    settings = DataSettings.model_validate(data)
    renderer = Renderer(tokenizer_of(folder, trust_remote_code=trust_remote_code), settings.template)
    rows = load(settings, Role(role)).train
    step = -(-len(rows) // SAMPLED)
    return list(_lengths(renderer, [rows[at] for at in range(0, len(rows), step)], Role(role)))


def _lengths(renderer: Renderer, rows: list[Any], role: Role) -> Iterator[list[int]]:
    if role is Role.PROMPTS:
        yield from ([len(renderer.prompt(row.messages, row.source))] for row in rows)
        return
    convert, parts = PARTS[role]
    for row in rows:
        converted = convert(renderer, row)
        yield [len(converted[part]) for part in parts]


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
