"""Gradient checkpointing: activations that are computed again in the backward pass and not kept (Chen et al. 2016)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

_ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
DEAR = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    *(getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in _ATTENTION),
]
"""What takes nearly all the time of a layer: matrix products and attention. Norms, activations and products of numbers
take a large part of the memory and are made again in no time (Korthikanti et al. 2022, section 5)."""


def recompute(model: Any, how: str) -> None:
    """Makes the layers of a transformer keep less for the backward pass: `none` changes nothing, `full` keeps the input
    of each layer, `selective` the results of DEAR too. Layers do so in training mode only."""
    if how == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, DEAR)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
