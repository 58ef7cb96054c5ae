"""What a recipe's `precision` means here. Apart from the trainers, which are slow to import and large."""

from __future__ import annotations

import torch


def training_dtype(precision: str) -> torch.dtype:
    """The dtype of the forward pass for a recipe's `precision`."""
    if precision == "auto":
        supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if supported else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def trains_in_bfloat16(precision: str) -> bool:
    """Whether TRL's trainers use mixed precision: on a GPU only."""
    return torch.cuda.is_available() and training_dtype(precision) is torch.bfloat16
