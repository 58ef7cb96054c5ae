"""Settings of `ppo`: proximal policy optimisation from a reward model. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from align.recipe.settings import CheckpointSettings, Data, Fraction, OptimSettings, Role, Settings, execution
from align.recipe.spec import Kind, Slot, StageSpec


class KLSettings(Settings):
    """The penalty that keeps the policy near the reference: r_t = -coef * (log pi - log ref), the k1 estimator."""

    coef: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the per-token log-ratio in the reward. Only this form has the KL-regularised optimum as fixed point."""


class ClipSettings(Settings):
    """Clipping of PPO's two losses (Schulman et al. 2017)."""

    policy: PositiveFloat = 0.2
    """The probability ratio is clipped to [1 - policy, 1 + policy]."""

    value: PositiveFloat | None = 0.2
    """The new value may differ from the old by this much. None: no clipping. Assumes a normalised reward."""


class MissingEosSettings(Settings):
    """What the score of a response that did not end is."""

    rule: Literal["replace", "subtract", "off"] = "replace"
    """replace: the score becomes `value`. subtract: the score is lowered by -`value`. off: the reward model's score."""

    value: Annotated[float, Field(le=0)] = -1.0
    """-1 is one standard deviation below the average response, for a normalised reward model."""


class RolloutSettings(Settings):
    """How responses are sampled."""

    engine: Literal["auto", "transformers"] = "auto"
    """What generates. auto picks the fastest one installed and says which."""

    prompts: PositiveInt = 512
    """Prompts per rollout, over all processes; one response each."""

    max_response_tokens: PositiveInt = 256
    """A response that has not ended by then is cut and counts as unfinished."""

    temperature: PositiveFloat = 1.0
    """Sampling temperature; the log-probabilities of policy and reference are taken at the same temperature."""

    micro_batch_size: PositiveInt = execution(64)
    """Prompts sampled and scored at a time; a matter of memory."""


class CriticSettings(Settings):
    """The value model. It starts from the reward model with its normalisation folded into the head."""

    optim: OptimSettings = OptimSettings(lr=9e-6, eps=1e-5)
    """The critic has its own optimiser; three times the actor's learning rate is a good start."""

    warmup_rollouts: Annotated[int, Field(ge=0)] = 0
    """Rollouts on which only the critic is trained."""


class Config(Settings):
    """PPO with a separate critic (Ziegler et al. 2019, Stiennon et al. 2020), our own trainer. docs/ppo.md has the
    equations and says where we differ."""

    kind: Literal["ppo"] = "ppo"
    """Stage kind."""

    policy: str | None = None
    """What is trained. None: `sft`, else `base`, else the recipe's `model`."""

    reference: str | None = None
    """What the KL is measured to; frozen. None: the policy this stage starts from."""

    reward: str | None = None
    """The reward model: a stage, a local folder or a hub id. None: the `reward` stage."""

    data: Data | None = None
    """Prompts; the responses of demonstrations and preferences are ignored. None: the recipe's `data`."""

    rollouts: PositiveInt = 200
    """Number of sample-and-improve rounds."""

    rollout: RolloutSettings = RolloutSettings()
    """Sampling."""

    epochs: PositiveInt = 4
    """Passes over each rollout."""

    minibatches: PositiveInt = 1
    """Optimiser steps per pass."""

    micro_batch_size: PositiveInt = 32
    """Sequences per forward and backward pass. Gradients are summed and divided once by the tokens of the whole step,
    so this changes memory, not the result."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount. Below 1 short answers are preferred."""

    lam: Fraction = 0.95
    """GAE's lambda (Schulman et al. 2015). 1 for answers over a thousand tokens."""

    whiten_advantages: bool = True
    """Advantages get mean 0 and standard deviation 1 over all valid tokens of the rollout."""

    kl: KLSettings = KLSettings()
    """KL penalty."""

    clip: ClipSettings = ClipSettings()
    """Clipping."""

    missing_eos: MissingEosSettings = MissingEosSettings()
    """Unfinished responses."""

    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an entropy bonus."""

    optim: OptimSettings = OptimSettings(lr=3e-6, eps=1e-5)
    """The actor's optimiser; its schedule is stepped once per rollout."""

    critic: CriticSettings = CriticSettings()
    """The critic and its optimiser."""

    max_prompt_tokens: PositiveInt = 768
    """Prompts over this are left out and counted, never cut."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where a GPU supports it, else float32. Log-probabilities are always float32."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    checkpoint: CheckpointSettings = CheckpointSettings()
    """Checkpoints, counted in rollouts."""

    samples_every: PositiveInt | None = execution(None)
    """Rollouts between entries of samples.jsonl. None: a tenth of the stage."""

    seed: int | None = None
    """None: the recipe's seed."""

    @model_validator(mode="after")
    def _divides(self) -> Config:
        if self.rollout.prompts % self.minibatches:
            raise ValueError(
                f"rollout.prompts {self.rollout.prompts} is not a multiple of minibatches {self.minibatches}"
            )
        return self


SPEC = StageSpec(
    kind="ppo",
    version=1,
    summary="PPO from a reward model",
    config=Config,
    output=Kind.POLICY,
    run="stages.ppo.run:run",
    data=Role.PROMPTS,
    inputs={
        "policy": Slot(Kind.POLICY, defaults=("sft", "base")),
        "reference": Slot(Kind.POLICY, same_as="policy"),
        "reward": Slot(Kind.REWARD, defaults=("reward",)),
    },
)
