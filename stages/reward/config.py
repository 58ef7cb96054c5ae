"""Settings of `reward`: a Bradley-Terry reward model. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from align.recipe.data_settings import Data, Role
from align.recipe.settings import Settings, source
from align.recipe.spec import Kind, Slot, StageSpec
from align.recipe.training_settings import OptimSettings, TrainingSettings

SCORING_BATCH = 64
"""Rows sampled or scored at a time."""


class NormaliseSettings(Settings):
    """The score is shifted and scaled to mean 0 and standard deviation 1 on samples of the starting policy."""

    samples: PositiveInt = 1024
    """Responses sampled, from training prompts."""

    max_response_tokens: PositiveInt = 256
    """Longest response sampled."""


class Config(TrainingSettings):
    """A reward model trained on preference pairs, on TRL's RewardTrainer, then normalised."""

    kind: Literal["reward"] = "reward"
    """Stage kind."""

    policy: str | None = source()
    """What the reward model starts from. None: `sft`, else `base`, else the recipe's `model`."""

    data: Data | None = None
    """Preferences. None: the recipe's `data`."""

    center: Annotated[float, Field(ge=0)] = 0.01
    """Weight of mean((r_chosen + r_rejected)^2), which keeps the offset from drifting (Eisenstein et al. 2023)."""

    normalise: NormaliseSettings = NormaliseSettings()
    """Normalisation of the finished model; PPO's defaults (missing-EOS score, value clip, KL coefficient) assume it."""

    optim: OptimSettings = OptimSettings(lr=1e-5, schedule="cosine", warmup=0.03)
    """Optimiser. With `lora`, 1e-4 is usual."""

    seed: int | None = None
    """None: the recipe's seed."""


SPEC = StageSpec(
    kind="reward",
    version=3,
    summary="reward model from preference pairs",
    config=Config,
    output=Kind.REWARD,
    run="stages.reward.run:run",
    data=Role.PREFERENCES,
    inputs={"policy": Slot(Kind.POLICY, defaults=("sft", "base"))},
    workload="stages.reward.memory:workload",
    distributed=True,
    trainer_config="trl.trainer.reward_config:RewardConfig",
)
