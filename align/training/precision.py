"""What a recipe's `precision` and `tf32` mean here. Apart from the trainers, which are slow to import and large."""

from __future__ import annotations

import torch

SMALLEST_SCALE = 1.0
"""Of a loss in float16. Where gradients overflow with this one too, they are too large by themselves."""


def training_dtype(precision: str) -> torch.dtype:
    """The dtype of the forward pass for a recipe's `precision`."""
    if precision == "auto":
        supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if supported else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def loss_scaler(dtype: torch.dtype, device: torch.device | str) -> torch.amp.GradScaler:
    """Keeps the gradients of float16 passes above the smallest float16 (Micikevicius et al. 2018, section 3.2): the
    loss is scaled up and gradients down, and a step whose gradients overflowed is left out and halves the scale. For
    other dtypes it does nothing."""
    return torch.amp.GradScaler(torch.device(device).type, enabled=dtype is torch.float16)


def may_overflow(scaler: torch.amp.GradScaler | None) -> bool:
    """Whether gradients that are not finite may be the scale's doing, so that the scaler leaves out the step."""
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() > SMALLEST_SCALE


def set_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 products to TF32. By default those of convolutions are."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
