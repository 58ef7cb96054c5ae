"""What every stage on a Hugging Face or TRL trainer shares: arguments, crash-safe checkpoints, guards, reporting.

The library's own trainers write checkpoints in place, resume from the highest number whether whole or not, log a NaN
loss as 0 and train on. `CommittedTrainer` replaces those parts and nothing else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align import ranks
from align.context import Context
from align.errors import ConfigError, DistributedError, NumericError, Problem
from align.recipe.training_settings import OptimSettings, TrainingSettings
from align.records import read_manifest
from align.training import fsdp
from align.training.adamw import TRAINERS_NAMES, check_device
from align.training.checkpoints import checkpoint_folder, keep_newest, resumable
from align.training.division import DividedTrainer, OwnRows
from align.training.precision import loss_scaler, may_overflow, set_tf32, training_dtype
from align.training.progress import StageProgress
from align.training.sharding import layout, leave_sharded, sharding_arguments, whole_while

SAVED_BY_TRAINER = "training_args.bin"
"""A pickle that the trainer writes into every checkpoint; it can hold tokens, and nothing reads it."""


def optimiser_arguments(optim: OptimSettings) -> dict[str, Any]:
    """Our optimiser settings in the trainer's vocabulary. Raises ConfigError where this machine has no such one."""
    check_device(optim)
    return {
        "optim": TRAINERS_NAMES[optim.kind],
        "learning_rate": optim.lr,
        "lr_scheduler_type": optim.schedule if optim.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": optim.warmup,  # below 1: a share of all steps
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
    }


def trainer_arguments(config: TrainingSettings, context: Context, optim: OptimSettings, rows: int) -> dict[str, Any]:
    """Arguments common to TRL's configs. Everything the library would otherwise decide by itself is decided here."""
    micro, accumulation = _micro_batches(config, context)
    steps = config.max_steps or max(1, math.ceil(rows * config.epochs / config.batch_size))
    dtype = training_dtype(config.precision)
    set_tf32(config.tf32)
    return {
        **housekeeping_arguments(context),
        **optimiser_arguments(optim),
        **sharding_arguments(micro, accumulation, optim.max_grad_norm, dtype is torch.bfloat16),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": False,  # stages do it themselves: align.models.recomputation
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "save_steps": config.checkpoint.every_steps or max(1, math.ceil(steps / 10)),
        "logging_steps": config.log_every,
        **config.trainer_args,
    }


def _micro_batches(config: TrainingSettings, context: Context) -> tuple[int, int]:
    try:
        return config.micro_batches(context.processes)
    except ValueError as error:
        raise ConfigError(Problem(f"{context.job.stage}.batch_size", str(error))) from error


def housekeeping_arguments(context: Context) -> dict[str, Any]:
    """Arguments that do not touch the maths."""
    # The tensorboard callback takes its folder from the environment only; the default lies among the checkpoints.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(context.directory / "tracking" / context.job.stage)
    return {
        "output_dir": str(context.checkpoints),
        "run_name": f"{context.directory.parent.parent.name}/{context.job.stage}",
        "seed": context.seed("training"),
        "data_seed": context.seed("data"),
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "steps",
        "report_to": list(context.job.track) or "none",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


class CommittedTrainer(DividedTrainer):
    """Mixin before a trainer class: checkpoints are whole or absent; no non-finite loss or gradient reaches the
    weights."""

    context: Context
    keep_checkpoints: int
    _total_train_tokens: float = 0
    """TRL's count of tokens seen. It is in every line of metrics, and TRL starts it at 0 when resuming."""

    def create_accelerator_and_postprocess(self) -> None:
        """Called by the library when the trainer is made. On a CPU too, passes in float16 are that: accelerate would
        say so and compute in float32."""
        fsdp.allow_on_cpu()
        super().create_accelerator_and_postprocess()
        accelerator: Any = self.accelerator
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            accelerator.native_amp, accelerator.scaler = True, loss_scaler(torch.float16, "cpu")

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch. Raises NumericError, before the backward pass, if it is not finite."""
        found = super().compute_loss(*args, **kwargs)
        loss: torch.Tensor = found[0] if isinstance(found, tuple) else found
        self._refuse_non_finite("loss", float(loss.detach()))
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing once all steps are done: the library would train one more when it resumes from the last."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm over all gradients, known after the backward pass and before the update. In float16 it may be that
        the scaled loss was too large: then the update is left out."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not may_overflow(self.accelerator.scaler):
            self._refuse_non_finite("gradient norm", float(norm))
        return norm

    def _refuse_non_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise NumericError(
                f"{self.context.job.stage}: the {name} is {value} at step {self.state.global_step + 1}; nothing was "
                "saved with it. Lower optim.lr, or look at the rows of that step"
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        target = checkpoint_folder(self.context.checkpoints, step)
        facts = {"step": step, "tokens": self._total_train_tokens, "layout": layout(self.accelerator)}
        with ranks.committed_together(target, **facts) as folder:
            # DeepSpeed and FSDP save the weights with the optimiser's state, in parts.
            if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                self.save_model(str(folder), _internal_call=True)
                (folder / SAVED_BY_TRAINER).unlink(missing_ok=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.context.is_main:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.context.is_main:
            keep_newest(self.context.checkpoints, self.keep_checkpoints, step)


class Reporter(TrainerCallback):
    """Writes metrics.jsonl, moves the progress bar, takes samples, and stops cleanly on a signal."""

    def __init__(
        self,
        context: Context,
        progress: StageProgress,
        shown: dict[str, str],
        sample: Callable[[int], None] | None = None,
        samples_every: int | None = None,
    ):
        self.context, self.progress, self.shown = context, progress, shown
        self.sample, self.samples_every = sample, samples_every

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """One line of metrics."""
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        if "train_runtime" in numbers:
            return
        self.context.metrics.write(state.global_step, **numbers)
        shown = {name: numbers[key] for key, name in self.shown.items() if key in numbers}
        self.progress.show(state.global_step, **shown)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Samples at fixed steps; after a signal, one last checkpoint."""
        self.progress.show(state.global_step)
        if self.sample and self.samples_every and state.global_step % self.samples_every == 0:
            self.sample(state.global_step)
        if ranks.any_of(self.context.stop.is_set):  # all processes stop at the same step
            self.context.stop.is_set = True
            control.should_save = control.should_training_stop = True
        return control


def run_training(
    trainer: CommittedTrainer,
    context: Context,
    *,
    keep_checkpoints: int,
    shown: dict[str, str],
    sample: Callable[[int], None] | None = None,
    samples_every: int | None = None,
) -> None:
    """Trains to the end, from the newest checkpoint that verifies if there is one.

    `shown` maps metric names to the short names of the progress bar. Raises Interrupted after a signal, with a
    checkpoint on disk, and NumericError on a non-finite loss or gradient.
    """
    trainer.context, trainer.keep_checkpoints = context, keep_checkpoints
    trainer.data_collator = OwnRows(trainer.data_collator, ranks.rank(), ranks.size())
    if trainer.accelerator.num_processes != context.processes:
        raise DistributedError(
            f"{context.job.stage}: {context.processes} processes were started, and the trainer works with "
            f"{trainer.accelerator.num_processes}"
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    held = layout(trainer.accelerator)
    found = resumable(context, held)
    if found and "disk" in held:
        stage = context.job.stage
        raise ConfigError(
            f"{stage}: DeepSpeed does not restore an optimiser whose state is on a disk (zero3-nvme); "
            f"start again with --force {stage}"
        )
    context.metrics.truncate_after(found[0] if found else 0)
    context.samples.truncate_after(found[0] if found else 0)
    trainer._total_train_tokens = read_manifest(found[1])["tokens"] if found else 0
    with StageProgress(context.job.stage, trainer.args.max_steps, "steps", enabled=context.is_main) as progress:
        trainer.add_callback(Reporter(context, progress, shown, whole_while(trainer, sample), samples_every))
        trainer.train(resume_from_checkpoint=str(found[1]) if found else None)
    unset_hf_deepspeed_config()  # else the libraries would shard whatever is loaded from here on
    step = trainer.state.global_step
    if context.stop.is_set and step < trainer.args.max_steps:
        context.stop_here(step)
    leave_sharded(trainer)
    # Mixed precision leaves a rounding forward on the models (policy and reference); what follows measures the weights.
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
