"""Settings of `dpo`: direct preference optimisation and its relatives. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from align.recipe.data_settings import Data, Role
from align.recipe.settings import refuse, source
from align.recipe.spec import Kind, Slot, StageSpec
from align.recipe.training_settings import OptimSettings, TrainingSettings, dropout_problems

LOSS_SETTINGS: dict[str, dict[str, float]] = {
    "sigmoid": {"beta": 0.1, "label_smoothing": 0.0},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "exo": {"beta": 0.1, "label_smoothing": 1e-3},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "sppo": {"beta": 1e-3},
    "aot": {"beta": 0.1, "label_smoothing": 0.0},
    "aot_unpaired": {"beta": 0.1, "label_smoothing": 0.0},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "orpo": {"beta": 0.1},
    "cpo": {"beta": 0.1},
}
"""What each loss of stages/dpo/losses.py takes, and the value where the recipe has none."""

WITHOUT_REFERENCE = ("simpo", "orpo", "cpo")
WITH_SFT = ("orpo", "cpo")
"""Losses that are published with the likelihood of chosen answers added."""


class Config(TrainingSettings):
    """Learning from preference pairs without a reward model: DPO (Rafailov et al. 2023) and its relatives. The
    reference is the policy this stage starts from, frozen."""

    kind: Literal["dpo"] = "dpo"
    """Stage kind."""

    policy: str | None = source()
    """What is trained. None: `sft`, else `base`, else the recipe's `model`."""

    data: Data | None = None
    """Preferences. None: the recipe's `data`."""

    loss: Literal[
        "sigmoid",
        "robust",
        "hinge",
        "ipo",
        "exo",
        "apo_zero",
        "apo_down",
        "sppo",
        "aot",
        "aot_unpaired",
        "simpo",
        "orpo",
        "cpo",
    ] = "sigmoid"
    """sigmoid is DPO. docs/dpo.md has the equation of each and says which to take when."""

    beta: PositiveFloat | None = None
    """Larger stays closer to the reference; simpo, cpo: the scale of log-probabilities; orpo: the weight of the odds
    ratio. None: 0.1; simpo 2, sppo 0.001."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """sigmoid, robust, exo, aot: the share of labels that are wrong. None: 0; robust 0.1, exo 0.001."""

    gamma: Annotated[float, Field(ge=0)] | None = None
    """simpo: the margin by which a chosen answer shall win. None: 1."""

    sft_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the negative log-likelihood of chosen answers per token, which is added to any loss: it keeps them
    likely. None: 0; orpo and cpo 1."""

    precompute_reference: bool = False
    """Computes the reference's log-probabilities once before training and keeps them on disk, so that it is not in
    memory while training. They differ from those computed on the way by rounding."""

    optim: OptimSettings = OptimSettings(lr=1e-6, schedule="linear", warmup=0.1)
    """Optimiser. With `lora`, about 1e-5; orpo, which needs no sft before it, 8e-6."""

    seed: int | None = None
    """None: the recipe's seed."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a reference."""
        return self.loss not in WITHOUT_REFERENCE

    @property
    def loss_settings(self) -> dict[str, float]:
        """The arguments of the loss by name."""
        defaults = LOSS_SETTINGS[self.loss]
        given = {name: getattr(self, name) for name in defaults}
        return {name: defaults[name] if value is None else value for name, value in given.items()}

    @property
    def sft_share(self) -> float:
        """`sft_weight`, or what the loss is published with."""
        return float(self.loss in WITH_SFT) if self.sft_weight is None else self.sft_weight

    @model_validator(mode="after")
    def _fits_the_loss(self) -> Config:
        takes = LOSS_SETTINGS[self.loss]
        problems = {
            name: f"the loss {self.loss} has no {name}; it takes {', '.join(takes)}"
            for name in ("label_smoothing", "gamma")
            if getattr(self, name) is not None and name not in takes
        }
        if self.loss == "exo" and self.label_smoothing == 0:
            problems["label_smoothing"] = "exo compares with the labels' distribution, which needs a share above 0"
        if self.precompute_reference and not self.needs_reference:
            problems["precompute_reference"] = f"the loss {self.loss} has no reference"
        refuse(problems | dropout_problems(self.lora))
        return self


SPEC = StageSpec(
    kind="dpo",
    version=3,
    summary="direct preference optimisation from preference pairs",
    config=Config,
    output=Kind.POLICY,
    run="stages.dpo.run:run",
    data=Role.PREFERENCES,
    inputs={"policy": Slot(Kind.POLICY, defaults=("sft", "base"))},
    workload="stages.dpo.memory:workload",
    distributed=True,
    trainer_config="trl.trainer.dpo_config:DPOConfig",
)
