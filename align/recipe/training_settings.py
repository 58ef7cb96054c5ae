"""Settings of training that stages share: model, optimiser, adapters, checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from align.recipe.launch_settings import LaunchSettings
from align.recipe.settings import Fraction, Settings, execution, shorthand


class ModelSettings(Settings):
    """A model that align did not train: a local folder or a hub id."""

    path: str
    """A local Hugging Face folder, or a hub id such as `Qwen/Qwen2.5-0.5B`. `id@revision` is accepted."""

    revision: str | None = None
    """Commit of a hub id (40 hex digits). Required for hub ids, so that the run can be repeated."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    @model_validator(mode="before")
    @classmethod
    def _split_revision(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("path"), str) and "revision" not in value:
            path, _, revision = value["path"].partition("@")
            if revision and not path.startswith("/"):  # a folder's name may hold an @
                return {**value, "path": path, "revision": revision}
        return value


Model = Annotated[ModelSettings, shorthand("path")]


class OptimSettings(Settings):
    """AdamW and its learning-rate schedule."""

    kind: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    """How AdamW's two moments are held: float32 (8 bytes per trained weight), or in 8 bits with a scale for every 256
    (2.03 bytes; Dettmers et al. 2022). paged: on a GPU only, in memory that moves to the machine's while there is no
    room. All but adamw need bitsandbytes."""

    lr: PositiveFloat
    """Peak learning rate."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up. linear and cosine end at 0."""

    warmup: Fraction = 0.0
    """Share of all steps over which the learning rate rises from 0."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW moments."""

    eps: PositiveFloat = 1e-8
    """AdamW epsilon."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW decoupled weight decay."""

    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm, measured over all processes."""

    @property
    def is_8bit(self) -> bool:
        """Whether the moments are held in 8 bits."""
        return self.kind.endswith("8bit")

    @property
    def is_paged(self) -> bool:
        """Whether the moments may move to main memory."""
        return self.kind.startswith("paged")


GradientCheckpointing = Annotated[
    Literal["none", "full", "selective", "auto"],
    BeforeValidator(lambda value: {True: "full", False: "none"}[value] if isinstance(value, bool) else value),
]
"""true and false stand for full and none."""


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021). The saved model is the effective one: adapter merged into its
    base."""

    rank: PositiveInt = 16
    """Rank of each update."""

    alpha: PositiveFloat = 32.0
    """Updates are scaled by alpha / rank."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""

    target_modules: str | list[str] = "all-linear"
    """Which linear layers get an adapter."""

    quantise: Literal["nf4"] | None = None
    """nf4: the frozen base is held in 4 bits (QLoRA, Dettmers et al. 2023; needs bitsandbytes). The saved model is what
    was trained: the base as its 4 bits decode, plus the adapter."""


def dropout_problems(lora: LoraSettings | None) -> dict[str, str]:
    """For `refuse`, in stages that compare the policy with what it was."""
    is_dropped = lora is not None and lora.dropout
    why = "has to be 0: policy and reference must agree before the first step"
    return {"lora.dropout": why} if is_dropped else {}


class CheckpointSettings(Settings):
    """Checkpoints inside a stage, from which an interrupted stage resumes."""

    every_steps: PositiveInt | None = execution(None)
    """Optimiser steps (PPO: rollouts) between checkpoints. None: a tenth of the stage."""

    keep: Annotated[int, Field(ge=1)] = execution(2)
    """How many are kept. All are removed once the stage's artifact is committed."""


class TrainingSettings(Settings):
    """What every gradient-trained stage on TRL has in common."""

    epochs: PositiveFloat = 1.0
    """Passes over the training rows."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimiser steps, whatever `epochs` says."""

    batch_size: PositiveInt = 32
    """Rows (pairs, for preference stages) per optimiser step, over all processes."""

    micro_batch_size: PositiveInt | None = None
    """Rows per forward pass and process; smaller uses less memory. None: the whole batch at once."""

    max_length: PositiveInt = 1024
    """Longest sequence in tokens, prompt and response together. Longer rows follow `on_long`."""

    on_long: Literal["drop", "error"] = "drop"
    """Rows over `max_length` are left out and counted, or stop the run. They are never cut: a cut row loses
    its EOS."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What passes compute in. auto: bfloat16 where a GPU supports it, else float32. Trained weights, their gradients
    and the optimiser's moments are float32 in every one (in bfloat16 under ZeRO: weights and moments). float16 scales
    the loss, and leaves out a step whose gradients overflow."""

    tf32: bool = False
    """On a GPU: round the factors of float32 products to 10 bits of mantissa, faster. It changes what float32 computes,
    and nothing else."""

    gradient_checkpointing: GradientCheckpointing = "none"
    """Recompute activations in the backward pass, to need less memory. full: all of each layer, about a third slower.
    selective: all but matrix products and attention, whose results are kept. auto: full where the stage would not fit
    the device without (`align plan --memory`), else none. true and false mean full and none."""

    padding_free: bool = True
    """Rows of a micro-batch are laid end to end, each looking at itself only, so that padding costs nothing. Where an
    architecture cannot (it is compared when the stage starts), batches are padded."""

    lora: LoraSettings | None = None
    """Train low-rank adapters instead of all weights."""

    checkpoint: CheckpointSettings = CheckpointSettings()
    """Checkpoints inside the stage."""

    log_every: PositiveInt = execution(10)
    """Optimiser steps between lines of metrics.jsonl."""

    samples_every: PositiveInt | None = execution(None)
    """Optimiser steps between entries of samples.jsonl. None: only at the end."""

    launch: LaunchSettings | None = execution(None)
    """Processes of this stage. None: the recipe's `launch`."""

    trainer_args: dict[str, Any] = {}
    """Passed to TRL's config of this stage as they are, for the arguments not modelled here. Names are
    checked; those that align sets itself are refused."""

    @property
    def quantise(self) -> str | None:
        """How the frozen base is held while an adapter is trained; None: in full."""
        return self.lora.quantise if self.lora else None

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """Rows per forward pass and process, and passes per step. Raises ValueError when `batch_size` cannot be divided
        so."""
        micro = self.micro_batch_size or max(1, self.batch_size // processes)
        passes, rest = divmod(self.batch_size, micro * processes)
        if rest or not passes:
            of = f" of {micro} rows (micro_batch_size)" if self.micro_batch_size else ""
            raise ValueError(f"batch_size {self.batch_size} cannot be divided among {processes} processes{of}")
        return micro, passes

    def process_problems(self, processes: int) -> dict[str, str]:
        """As `Settings.process_problems`."""
        try:
            self.micro_batches(processes)
        except ValueError as error:
            return {"batch_size": str(error)}
        return {}

    @model_validator(mode="after")
    def _micro_divides(self) -> TrainingSettings:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self
