"""Settings of `sft`: supervised fine-tuning. Torch-free."""

from __future__ import annotations

from typing import Literal

from align.recipe.data_settings import Data, Role
from align.recipe.settings import source
from align.recipe.spec import Kind, Slot, StageSpec
from align.recipe.training_settings import OptimSettings, TrainingSettings


class Config(TrainingSettings):
    """Supervised fine-tuning on demonstrations, on TRL's SFTTrainer. Only the assistant's tokens are trained on, the
    end of the turn included."""

    kind: Literal["sft"] = "sft"
    """Stage kind."""

    policy: str | None = source()
    """What is trained: a stage, a local folder or a hub id. None: the `base` stage, else the recipe's `model`."""

    data: Data | None = None
    """Demonstrations. None: the recipe's `data`."""

    optim: OptimSettings = OptimSettings(lr=2e-5, schedule="cosine", warmup=0.03)
    """Optimiser. With `lora`, a learning rate about ten times larger is usual."""

    seed: int | None = None
    """None: the recipe's seed."""


SPEC = StageSpec(
    kind="sft",
    version=2,
    summary="supervised fine-tuning on demonstrations",
    config=Config,
    output=Kind.POLICY,
    run="stages.sft.run:run",
    data=Role.DEMONSTRATIONS,
    inputs={"policy": Slot(Kind.POLICY, defaults=("base",))},
    workload="stages.sft.memory:workload",
    distributed=True,
    trainer_config="trl.trainer.sft_config:SFTConfig",
)
