"""Saving a model as a plain Hugging Face folder that `from_pretrained` and vLLM load with no converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from align.data.render import Renderer


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, renderer: Renderer) -> None:
    """Writes safetensors, config, tokenizer with its chat template, and a generation config that knows every stop
    token. Sampling settings of the original checkpoint (temperature, top_p ...) are not carried over."""
    model.config.pad_token_id = renderer.pad_id
    model.config.eos_token_id = tokenizer.eos_token_id
    stop = list(renderer.stop_ids)
    generation = GenerationConfig(
        eos_token_id=stop if len(stop) > 1 else stop[0],
        pad_token_id=renderer.pad_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation.save_pretrained(folder)
