"""Settings of `dpo`: direct preference optimisation. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, model_validator

from align.recipe.settings import Data, OptimSettings, Role, TrainingSettings, refuse, source
from align.recipe.spec import Kind, Slot, StageSpec


class Config(TrainingSettings):
    """DPO (Rafailov et al. 2023) on TRL's DPOTrainer. The reference is the policy this stage starts from, frozen."""

    kind: Literal["dpo"] = "dpo"
    """Stage kind."""

    policy: str | None = source()
    """What is trained. None: `sft`, else `base`, else the recipe's `model`."""

    data: Data | None = None
    """Preferences. None: the recipe's `data`."""

    beta: PositiveFloat = 0.1
    """Strength of the KL constraint: larger stays closer to the reference."""

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid is DPO; hinge is SLiC; ipo is Azar et al. 2023 with TRL's per-token mean."""

    optim: OptimSettings = OptimSettings(lr=1e-6, schedule="linear", warmup=0.1)
    """Optimiser. With `lora`, about 1e-5."""

    seed: int | None = None
    """None: the recipe's seed."""

    @model_validator(mode="after")
    def _no_dropout(self) -> Config:
        if self.lora is not None and self.lora.dropout:
            refuse({"lora.dropout": "has to be 0: policy and reference must agree before the first step"})
        return self


SPEC = StageSpec(
    kind="dpo",
    version=2,
    summary="direct preference optimisation from preference pairs",
    config=Config,
    output=Kind.POLICY,
    run="stages.dpo.run:run",
    data=Role.PREFERENCES,
    inputs={"policy": Slot(Kind.POLICY, defaults=("sft", "base"))},
    workload="stages.dpo.memory:workload",
    trainer_config="trl.trainer.dpo_config:DPOConfig",
)
