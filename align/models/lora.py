"""Low-rank adapters. What a stage hands on is always the effective model: base and adapter merged.

The adapter itself is kept beside it (`model/adapter/`) for those who serve many adapters on one base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from align.recipe.training_settings import LoraSettings


def add_lora(model: Any, settings: LoraSettings, *, is_reward: bool = False) -> PeftModel:
    """Wraps a model with fresh adapters (B = 0, so it computes the same as before). A reward model's head is trained
    in full and saved with the adapter: a head left out of an adapter is the field's most repeated hand-over bug."""
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if is_reward else TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float is fine
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        modules_to_save=["score"] if is_reward else None,
    )
    return get_peft_model(model, config)


def merged(model: Any, adapter: str | None = None) -> Any:
    """The effective model: one adapter (None: the active one) merged into the base weights, all others dropped; or the
    model itself when it has none. A base in NF4 is decoded first and stays in full: what was trained is the decoded
    base plus the adapter, and 4 bits cannot hold the sum.

    Raises ValueError when the adapter holds non-finite values.
    """
    if not isinstance(model, PeftModel):
        return model
    _decode(model)
    return model.merge_and_unload(safe_merge=True, adapter_names=[adapter] if adapter else model.active_adapters)


def _decode(model: PeftModel) -> None:
    """Puts every NF4 layer in full, in place: float32, in CPU memory, because in full it may not fit where it was."""
    # Known by what they can do: align.models.quantised needs bitsandbytes, which is optional.
    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "decoded")]
    if layers:
        model.cpu().float()
    for name, layer in layers:
        plain = layer.decoded()
        model.set_submodule(name, plain)
        adapted = model.get_submodule(name.rpartition(".")[0])
        if isinstance(adapted, Linear):  # an adapter around it
            adapted.fan_in_fan_out = isinstance(plain, Conv1D)


def without_wrapper(model: Any) -> Any:
    """The model itself, with its adapters still in place and at work: for what reaches into backbone and head."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapter_parameters(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Of all adapters on a model."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parts = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    return {parameter for part in parts for parameter in part.parameters()}


def save_adapter(model: Any, folder: Path) -> None:
    """Writes the active adapter beside the effective model; call it before merging. A model without one: nothing."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder / "adapter"), selected_adapters=model.active_adapters)


def trainable_parameters(model: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
