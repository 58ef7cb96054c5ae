"""AdamW with its moments in float32 or in 8 bits (Dettmers et al. 2022), and on a GPU perhaps paged: moved to main
memory by the driver while they do not fit (Dettmers et al. 2023, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import ConfigError, Problem
from align.recipe.training_settings import OptimSettings

TRAINERS_NAMES = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}
"""By `optim.kind`, what transformers' trainer calls it."""


def new_adamw(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimiser of these parameters. Raises ConfigError where this machine has none such."""
    check_device(settings)
    given: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.kind == "adamw":
        return torch.optim.AdamW(list(parameters), fused=True, **given)
    from bitsandbytes.optim import AdamW, GlobalOptimManager  # optional

    # Exceptions for single weights, which transformers' trainer makes, are kept by their place in any optimiser.
    GlobalOptimManager.get_instance().initialize()
    return AdamW(list(parameters), optim_bits=8 if settings.is_8bit else 32, is_paged=settings.is_paged, **given)


def check_device(settings: OptimSettings) -> None:
    """Raises ConfigError for what this machine cannot do: on a CPU bitsandbytes would quietly not page."""
    if settings.is_paged and not torch.cuda.is_available():
        hint = "use adamw-8bit, or adamw" if settings.is_8bit else "use adamw"
        raise ConfigError(Problem("optim.kind", f"{settings.kind} pages memory of a GPU, and there is none", hint))


def state_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All state, for safetensors: by the number of the parameter and the name of its state. Numbers that are no tensors
    become int64 ones."""
    return {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in _flat(values).items()
    }


def restore_state(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Gives an optimiser the state of another one with the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = int(value) if value.dtype is torch.int64 else value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes keeps the tensors of a quantised state in a dictionary of their own."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    # The table of an 8-bit number's values is one tensor for all weights, and safetensors wants each by itself.
    return {name: value.clone() if name.startswith("qmap") else value for name, value in flat.items()}
