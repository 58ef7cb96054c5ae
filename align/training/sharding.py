"""Models whose weights, gradients or optimiser states are sharded over the processes (DeepSpeed's ZeRO, FSDP), in TRL's
trainers."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from trl.models import unwrap_model_for_generation
from trl.models.utils import remove_hooks

from align import ranks
from align.errors import ConfigError, Problem
from align.models.partitioned import make_whole
from align.recipe.training_settings import TrainingSettings
from align.recipe.zero import FROM_RECIPE, nvme_folder, read_zero
from align.training import fsdp
from align.training.precision import training_dtype


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


@contextmanager
def loading(config: TrainingSettings) -> Iterator[None]:
    """Inside, models are loaded in parts under ZeRO-3: no process ever has all weights. One in 4 bits is loaded whole,
    and parted when training starts."""
    settings = sharding_arguments(1, 1, 0.0, training_dtype(config.precision) is torch.bfloat16).get("deepspeed")
    if settings is None or config.quantise or settings["zero_optimization"].get("stage") != 3:
        yield
        return
    kept = HfDeepSpeedConfig(settings)  # from_pretrained heeds it while it exists
    yield
    del kept


def launched_with() -> dict[str, Any]:
    """What the launcher was told of DeepSpeed, less what the recipe says. A disk to move states to is checked, and is a
    folder of this process on it."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        settings = read_zero(Path(file))
        disk = nvme_folder(settings)
        if disk is not None:
            settings["zero_optimization"]["offload_optimizer"]["nvme_path"] = _own_folder(disk)
        return settings
    from accelerate.utils import DeepSpeedPlugin

    inline = DeepSpeedPlugin().deepspeed_config
    return {key: value for key, value in inline.items() if key not in FROM_RECIPE}


@cache
def _own_folder(disk: str) -> str:
    """On a disk where other processes and runs have theirs; it goes when this process ends."""
    _check_disk_access()
    folder = tempfile.mkdtemp(prefix="align-", dir=disk)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _check_disk_access() -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if shutil.which("ninja") is None or not accelerator.create_op_builder("AsyncIOBuilder").is_compatible():
        what = "DeepSpeed moves states to a disk with libaio, and a program that uses it cannot be built here"
        hint = "install libaio with its headers (libaio-dev), a C++ compiler, and ninja on the PATH"
        raise ConfigError(Problem("launch.strategy", what, hint))


def layout(accelerator: Accelerator) -> dict[str, Any]:
    """Who writes a checkpoint: others cannot read it."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    sharded = {"fsdp": True} if accelerator.is_fsdp2 else {}
    if plugin and nvme_folder(launched_with()) is not None:
        sharded["disk"] = True
    return {"processes": accelerator.num_processes, "zero": plugin.zero_stage if plugin else 0, **sharded}


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
    models: list[Any] = [trainer.model_wrapped, getattr(trainer, "ref_model", None)]
    for model in filter(None, models):
        if trainer.accelerator.is_fsdp2:
            fsdp.leave(model)
        elif layout(trainer.accelerator)["zero"] == 3:
            _leave_zero(model)


def _leave_zero(engine: Any) -> None:
    remove_hooks(engine)
    make_whole(engine.module)
