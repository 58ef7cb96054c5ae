"""Settings of `ppo`, `rloo` and `grpo`: one loop, several estimators of the advantage. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from align.recipe.data_settings import Data, Role
from align.recipe.launch_settings import LaunchSettings
from align.recipe.settings import Fraction, Settings, execution, refuse, source
from align.recipe.spec import Kind, Slot, StageSpec
from align.recipe.training_settings import CheckpointSettings, GradientCheckpointing, LoraSettings, OptimSettings
from align.rewards.settings import DEFAULT_TERM, RewardTerm, reward_terms
from stages.ppo import distributed
from stages.ppo.contradictions import contradictions
from stages.ppo.settings import (
    ClipSettings,
    CriticSettings,
    KLSettings,
    MissingEosSettings,
    NonNegative,
    OverlongSettings,
    PtxSettings,
    RolloutSettings,
)

INPUTS = {
    "policy": Slot(Kind.POLICY, defaults=("sft", "base")),
    "reference": Slot(Kind.POLICY, same_as="policy"),
    "reward": Slot(Kind.REWARD, defaults=("reward",)),
}


class Config(Settings):
    """PPO (Ziegler et al. 2019, Stiennon et al. 2020), our own trainer. docs/ppo.md has the equations and says where
    we differ."""

    kind: Literal["ppo"] = "ppo"
    """Stage kind."""

    estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = "gae"
    """How an action's advantage is estimated. gae: with a critic. rloo: against the mean of the other responses to the
    prompt (Ahmadian et al. 2024). grpo: against the mean of all of them, over their standard deviation (Shao et al.
    2024). reinforce++: reward to go, whitened (Hu 2025). Only gae holds a critic in memory."""

    policy: str | None = source()
    """What is trained. None: `sft`, else `base`, else the recipe's `model`."""

    reference: str | None = source()
    """What the KL is measured to; frozen. None: the policy this stage starts from."""

    reward: Annotated[dict[str, RewardTerm], BeforeValidator(reward_terms)] = Field({DEFAULT_TERM: RewardTerm()})
    """What is maximised: a reward model (a stage, a local folder or a hub id), a list of them (an ensemble), or named
    terms that are added up. None: the `reward` stage."""

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

    micro_batch_tokens: PositiveInt | None = None
    """Tokens per forward and backward pass at most, padding included; sequences of similar length are put together.
    None: only `micro_batch_size` counts."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount. Below 1 short answers are preferred."""

    lam: Fraction = 0.95
    """GAE's lambda (Schulman et al. 2015). 1 for answers over a thousand tokens."""

    lam_value: Fraction | None = None
    """Another lambda for the critic's targets (decoupled GAE, Yuan et al. 2025); 1 for long answers. None: `lam`."""

    lam_length: PositiveFloat | None = None
    """Length-adaptive lambda 1 - 1/(lam_length * tokens) for the policy (Yue et al. 2025), 0.05 is usual; `lam` is then
    the critic's. None: `lam` for all."""

    whiten_advantages: bool = True
    """Advantages get mean 0 and standard deviation 1 over all valid tokens of the rollout."""

    divide_by_std: bool = True
    """grpo: divide by the standard deviation of the prompt's scores. False is Dr. GRPO (Liu et al. 2025)."""

    normaliser: Literal["tokens", "constant"] = "tokens"
    """What a step's sum over tokens is divided by. tokens: their number. constant: responses times
    rollout.max_response_tokens (Dr. GRPO), so that a long response counts for more."""

    kl: KLSettings = KLSettings()
    """KL penalty."""

    clip: ClipSettings = ClipSettings()
    """Clipping."""

    missing_eos: MissingEosSettings = MissingEosSettings()
    """Unfinished responses."""

    overlong: OverlongSettings | None = None
    """Penalty on responses close to the cap. None: none."""

    score_clip: PositiveFloat | None = None
    """Scores are clipped to +- this. It moves the optimum; None: not clipped."""

    entropy_coef: NonNegative = 0.0
    """Weight of an entropy bonus."""

    ptx: PtxSettings | None = None
    """Demonstrations mixed in. None: none."""

    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The stage's artifact is the exponential moving average of the trained weights, over rollouts, with this decay
    (0.992 in Ouyang et al. 2022). None: the last weights."""

    lora: LoraSettings | None = None
    """Train an adapter instead of all weights: one frozen base then serves actor, critic, reference, and every reward
    model that was trained as an adapter on it."""

    optim: OptimSettings = OptimSettings(lr=3e-6, eps=1e-5)
    """The actor's optimiser; its schedule is stepped once per rollout. With `lora`, ten times the rate is usual."""

    critic: CriticSettings = CriticSettings()
    """The critic and its optimiser."""

    max_prompt_tokens: PositiveInt = 768
    """Prompts over this are left out and counted, never cut."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What passes compute in. auto: bfloat16 where a GPU supports it, else float32. Trained weights, their gradients
    and moments are always float32, and so are log-probabilities. float16 scales the loss, and leaves out a step whose
    gradients overflow."""

    tf32: bool = False
    """On a GPU: round the factors of float32 products to 10 bits of mantissa, faster. It changes what float32 computes,
    and nothing else."""

    fp32_lm_head: bool = False
    """Compute logits in float32 in a bfloat16 run: closer log-probabilities for a slower head."""

    gradient_checkpointing: GradientCheckpointing = "none"
    """Recompute activations in the backward pass, to need less memory. full: all of each layer, about a third slower.
    selective: all but matrix products and attention, whose results are kept. auto: full where the stage would not fit
    the device without (`align plan --memory`), else none. true and false mean full and none."""

    offload: list[Literal["reference", "reward"]] = execution([])
    """Frozen models that wait in CPU memory and are moved to the GPU for their pass only."""

    checkpoint: CheckpointSettings = CheckpointSettings()
    """Checkpoints, counted in rollouts."""

    samples_every: PositiveInt | None = execution(None)
    """Rollouts between entries of samples.jsonl. None: a tenth of the stage."""

    launch: LaunchSettings | None = execution(None)
    """Processes of this stage. None: the recipe's `launch`."""

    seed: int | None = None
    """None: the recipe's seed."""

    @property
    def has_critic(self) -> bool:
        """Whether values are estimated at all."""
        return self.estimator == "gae"

    @property
    def compares(self) -> bool:
        """Whether the advantage of a response comes from the other responses to its prompt."""
        return self.estimator in {"rloo", "grpo"}

    @property
    def responses(self) -> int:
        """Responses per rollout, over all processes."""
        return self.rollout.prompts * self.rollout.responses_per_prompt

    def sources(self, slot: str) -> dict[str, str | None]:
        """What each input of a slot is called and where the recipe takes it from; see `Settings.sources`."""
        if slot != "reward":
            return super().sources(slot)
        return {key: name for term, settings in self.reward.items() for key, name in settings.inputs(term).items()}

    def process_problems(self, processes: int) -> dict[str, str]:
        """As `Settings.process_problems`: each process has whole prompts, with all their responses."""
        return distributed.process_problems(self, processes)

    def zero_problems(self, stage: int) -> dict[str, str]:
        """As `Settings.zero_problems`."""
        return distributed.zero_problems(self, stage)

    def fsdp_problems(self, offloads: bool) -> dict[str, str]:
        """As `Settings.fsdp_problems`."""
        return distributed.fsdp_problems(self, offloads)

    def is_changed(self, name: str) -> bool:
        """Whether a setting, by its dotted key, differs from PPO's default."""
        ours, default = self, Config.model_construct()
        for key in name.split("."):
            ours, default = getattr(ours, key), getattr(default, key)
        return ours != default

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        refuse(contradictions(self, INPUTS))
        return self


class RlooConfig(Config):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024): PPO's loop without a critic."""

    kind: Literal["rloo"] = "rloo"  # type: ignore[assignment]
    """Stage kind."""

    estimator: Literal["rloo"] = "rloo"  # type: ignore[assignment]
    """Against the mean of the other responses to the prompt."""

    rollout: RolloutSettings = RolloutSettings(prompts=128, responses_per_prompt=4)
    """Sampling."""

    epochs: PositiveInt = 1
    """Passes over each rollout."""

    whiten_advantages: bool = False
    """Advantages get mean 0 and standard deviation 1 over all valid tokens of the rollout."""


class GrpoConfig(Config):
    """Group-relative policy optimisation (Shao et al. 2024): PPO's loop without a critic. `divide_by_std: false` with
    `normaliser: constant` is Dr. GRPO."""

    kind: Literal["grpo"] = "grpo"  # type: ignore[assignment]
    """Stage kind."""

    estimator: Literal["grpo"] = "grpo"  # type: ignore[assignment]
    """Against the mean of all responses to the prompt, over their standard deviation."""

    rollout: RolloutSettings = RolloutSettings(prompts=128, responses_per_prompt=4)
    """Sampling."""

    epochs: PositiveInt = 1
    """Passes over each rollout."""

    whiten_advantages: bool = False
    """Advantages get mean 0 and standard deviation 1 over all valid tokens of the rollout."""

    kl: KLSettings = KLSettings(estimator="k2")
    """KL penalty."""


def _spec(kind: str, summary: str, config: type[Config]) -> StageSpec:
    return StageSpec(
        kind=kind,
        version=3 if kind == "ppo" else 2,
        summary=summary,
        config=config,
        output=Kind.POLICY,
        run="stages.ppo.run:run",
        data=Role.PROMPTS,
        inputs=INPUTS,
        more_data={"ptx.data": Role.DEMONSTRATIONS},
        memory="stages.ppo.layout:describe",
        workload="stages.ppo.memory:workload",
        distributed=True,
    )


PPO = _spec("ppo", "PPO from a reward model", Config)

RLOO = _spec("rloo", "RLOO: no critic, several responses per prompt", RlooConfig)

GRPO = _spec("grpo", "GRPO: no critic, scores relative to their group", GrpoConfig)
