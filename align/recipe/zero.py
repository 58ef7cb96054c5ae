"""DeepSpeed's settings files: they say how the work is shared, and the recipe says everything else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import ConfigError, Problem

FROM_RECIPE = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "activation_checkpointing": "gradient_checkpointing",
    "zero_force_ds_cpu_optimizer": "optim",
}
"""What a file may not say unless it is "auto", and the setting of a stage that says it."""


def read_zero(path: Path) -> dict[str, Any]:
    """The content of a DeepSpeed file. Raises ConfigError naming every key that contradicts the recipe."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(str(path), f"not a readable DeepSpeed file: {error}")) from error
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization"), dict):
        raise ConfigError(Problem(str(path), "has no `zero_optimization`", "see deepspeed/zero2.json for an example"))
    problems = [
        Problem(f"{path}: {key}", "the recipe says this", f"remove it and set `{setting}` of the stage")
        for key, setting in FROM_RECIPE.items()
        if key in content and not all(value == "auto" for value in _leaves(content[key]))
    ]
    if (content["zero_optimization"].get("offload_param") or {}).get("device") == "nvme":
        what = "weights cannot be on a disk: DeepSpeed reads few of them at a time, and a model is measured whole"
        problems.append(Problem(f"{path}: zero_optimization.offload_param", what, "set `device: cpu`"))
    if problems:
        raise ConfigError(problems)
    return {key: value for key, value in content.items() if key not in FROM_RECIPE}


def nvme_folder(content: dict[str, Any]) -> str | None:
    """The folder that a DeepSpeed file moves the optimiser's state to."""
    moved = content["zero_optimization"].get("offload_optimizer") or {}
    return moved.get("nvme_path") if moved.get("device") == "nvme" else None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value
