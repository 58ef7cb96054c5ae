"""Models whose weights, gradients or optimiser states DeepSpeed shards over the processes (ZeRO), in TRL's trainers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import Trainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import remove_hooks

from align import ranks
from align.recipe.zero import FROM_RECIPE, read_zero


def sharding_arguments(micro: int, accumulation: int, max_grad_norm: float, in_bfloat16: bool) -> dict[str, Any]:
    """What the trainer is told of DeepSpeed: the launcher's file, and in all else the recipe. Empty without it."""
    if not ranks.uses_deepspeed():
        return {}
    settings = launched_with() | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,  # by itself it clips to 1
        "bf16": {"enabled": in_bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the same AdamW wherever its state is
    }
    return {"deepspeed": settings}


def launched_with() -> dict[str, Any]:
    """What the launcher was told of DeepSpeed, less what the recipe says."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return read_zero(Path(file))
    from accelerate.utils import DeepSpeedPlugin

    inline = DeepSpeedPlugin().deepspeed_config
    return {key: value for key, value in inline.items() if key not in FROM_RECIPE}


def layout(accelerator: Accelerator) -> dict[str, Any]:
    """Who writes a checkpoint: others cannot read it."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return {"processes": accelerator.num_processes, "zero": plugin.zero_stage if plugin else 0}


def whole_while(trainer: Any, sample: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """The same function, run while the policy's weights are whole in every process."""
    if sample is None or layout(trainer.accelerator)["zero"] != 3:
        return sample

    def run(step: int) -> None:
        kwargs = trainer.args.gradient_checkpointing_kwargs
        with unwrap_model_for_generation(
            trainer.model_wrapped, trainer.accelerator, gradient_checkpointing_kwargs=kwargs
        ):
            sample(step)

    return run


def leave_sharded(trainer: Trainer) -> None:
    """After training: makes the weights of policy and reference whole in every process, for good. What is measured and
    saved from here on is an ordinary model."""
    if layout(trainer.accelerator)["zero"] != 3:
        return
    import deepspeed

    engines: list[Any] = [trainer.model_wrapped, getattr(trainer, "ref_model", None)]
    for engine in engines:
        if engine is not None:
            remove_hooks(engine)
            deepspeed.zero.GatheredParameters(list(engine.module.parameters())).__enter__()
