"""Settings of `kto`: Kahneman-Tversky optimisation. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, model_validator

from align.recipe.data_settings import Data, Role
from align.recipe.settings import refuse, source
from align.recipe.spec import Kind, Slot, StageSpec
from align.recipe.training_settings import OptimSettings, TrainingSettings, dropout_problems


class Config(TrainingSettings):
    """KTO (Ethayarajh et al. 2024) from single answers that were judged good or bad. Preferences serve too: each pair
    is one good and one bad answer. The reference is the policy this stage starts from, frozen."""

    kind: Literal["kto"] = "kto"
    """Stage kind."""

    policy: str | None = source()
    """What is trained. None: `sft`, else `base`, else the recipe's `model`."""

    data: Data | None = None
    """Judgements or preferences. None: the recipe's `data`."""

    beta: PositiveFloat = 0.1
    """Strength of the KL constraint: larger stays closer to the reference."""

    good_weight: PositiveFloat = 1.0
    """Weight of good answers, on top of `balance`. Larger where a bad answer costs little."""

    bad_weight: PositiveFloat = 1.0
    """Weight of bad answers, on top of `balance`. Larger where a bad answer costs much."""

    balance: bool = True
    """Good and bad answers count the same in sum, however many there are of each."""

    precompute_reference: bool = False
    """Computes the reference's log-probabilities once before training and keeps them on disk, so that it is not in
    memory while training. They differ from those computed on the way by rounding."""

    optim: OptimSettings = OptimSettings(lr=1e-6, schedule="linear", warmup=0.1)
    """Optimiser. With `lora`, about 1e-5."""

    seed: int | None = None
    """None: the recipe's seed."""

    @model_validator(mode="after")
    def _kl_can_be_estimated(self) -> Config:
        problems = {}
        if min(self.batch_size, self.micro_batch_size or self.batch_size) < 2:
            name = "batch_size" if self.micro_batch_size is None else "micro_batch_size"
            problems[name] = "has to be 2 or more: the KL is estimated on the answers of a micro-batch"
        refuse(problems | dropout_problems(self.lora))
        return self


SPEC = StageSpec(
    kind="kto",
    version=1,
    summary="policy from single answers judged good or bad",
    config=Config,
    output=Kind.POLICY,
    run="stages.kto.run:run",
    data=Role.JUDGEMENTS,
    inputs={"policy": Slot(Kind.POLICY, defaults=("sft", "base"))},
    workload="stages.kto.memory:workload",
    distributed=True,
    trainer_config="trl.trainer.dpo_config:DPOConfig",
)
