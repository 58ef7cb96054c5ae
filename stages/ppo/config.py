"""Settings of `ppo`, `rloo` and `grpo`: one loop, several estimators of the advantage. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from align.recipe.settings import (
    CheckpointSettings,
    Data,
    EngineSettings,
    Fraction,
    LoraSettings,
    OptimSettings,
    Role,
    Settings,
    execution,
    refuse,
    source,
)
from align.recipe.spec import Kind, Slot, StageSpec
from align.rewards.settings import DEFAULT_TERM, RewardTerm, reward_terms

NonNegative = Annotated[float, Field(ge=0)]
WITH_CRITIC = "gae"
VALUED_RULES = ("replace", "subtract")
TERM_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
INPUTS = {
    "policy": Slot(Kind.POLICY, defaults=("sft", "base")),
    "reference": Slot(Kind.POLICY, same_as="policy"),
    "reward": Slot(Kind.REWARD, defaults=("reward",)),
}


def refuse_estimators(value: Any) -> Any:
    """Raises ValueError, with the reason, for an estimator that is used elsewhere and has another optimum."""
    if value == "k3":
        raise ValueError(
            "k3 is not on offer: in the reward its gradient is not that of the KL (on the test problem it ends at a "
            "total variation of 0.42 from the optimum, k1 at 0), as a loss it is that of KL(ref || pi)"
        )
    if value in {"abs", "mse"}:
        raise ValueError(f"{value} is not on offer: in the reward its gradient is not that of the KL; k1 is signed")
    return value


class KLSettings(Settings):
    """What keeps the policy near the reference."""

    coef: NonNegative = 0.05
    """Weight beta of the KL."""

    estimator: Annotated[Literal["k1", "k2"], BeforeValidator(refuse_estimators)] = "k1"
    """k1: in the reward, r_t = -coef * (log pi - log ref). k2: as a loss, + coef * (log pi - log ref)^2 / 2 on each
    token, with the ratio as correction: a variant. Its gradient is that of the KL of each token alone, so on long
    responses its optimum is another one."""

    target: PositiveFloat | None = None
    """Adaptive coefficient (Ziegler et al. 2019): moved so that the KL per response comes to this many nats. None:
    fixed."""

    horizon: PositiveInt = 10_000
    """Episodes over which the adaptive coefficient moves."""

    budget: PositiveFloat | None = None
    """The stage ends, complete, with the first rollout whose KL per response is above this many nats, before that
    rollout is learned from. None: no limit."""


class ClipSettings(Settings):
    """Clipping of PPO's two losses (Schulman et al. 2017)."""

    policy: PositiveFloat = 0.2
    """The probability ratio is clipped to [1 - policy, 1 + policy]."""

    policy_high: PositiveFloat | None = None
    """Another upper bound, 1 + policy_high: 0.28 leaves unlikely tokens more room (Yu et al. 2025). None: `policy`."""

    dual: Annotated[float, Field(gt=1)] | None = None
    """Bounds the loss of a token with a negative advantage by -dual * A (Ye et al. 2020); 3 is usual. None: not."""

    value: PositiveFloat | None = 0.2
    """The new value may differ from the old by this much. None: no clipping. Assumes a normalised reward."""

    approxkl: PositiveFloat | None = None
    """No further updates from a rollout once an update finds the policy this far (approximate KL per token) from the
    one that sampled it. None: all epochs."""


class MissingEosSettings(Settings):
    """What becomes of a response that did not end."""

    rule: Literal["replace", "subtract", "off", "bootstrap", "mask"] = "replace"
    """replace: its score becomes `value`. subtract: its score is lowered by -`value`. off: the reward's own score.
    bootstrap: it has no score, and goes on with the critic's value of where it was cut. mask: nothing is learned from
    it."""

    value: Annotated[float, Field(le=0)] = -1.0
    """-1 is one standard deviation below the average response, for a normalised reward model."""


class OverlongSettings(Settings):
    """A penalty that grows linearly over the last tokens before the cap (Yu et al. 2025, soft overlong punishment)."""

    buffer: PositiveInt
    """Tokens before rollout.max_response_tokens over which the penalty grows from 0 to `penalty`."""

    penalty: NonNegative = 1.0
    """What a response at the cap loses."""


class RolloutSettings(EngineSettings):
    """How responses are sampled."""

    prompts: PositiveInt = 512
    """Prompts per rollout, over all processes."""

    responses_per_prompt: PositiveInt = 1
    """Responses to each of them. rloo and grpo compare the responses to one prompt and need at least 2."""

    max_response_tokens: PositiveInt = 256
    """A response that has not ended by then is cut and counts as unfinished."""

    temperature: PositiveFloat = 1.0
    """Sampling temperature; the log-probabilities of policy and reference are taken at the same temperature."""

    round_tokens: PositiveInt | None = None
    """Tokens that a response grows by in one rollout, a part of max_response_tokens. One that has not ended by then is
    carried over: it goes on in the next rollout, under the policy of then, while those that ended are learned from and
    new prompts take their places. So the longest responses are not waited for. None: all end in their rollout."""

    until_ended: Fraction = 0.0
    """With round_tokens: responses grow by round_tokens at a time until this share of those in the rollout has ended;
    what is left is carried over. 0: once."""

    max_staleness: PositiveInt | None = None
    """With round_tokens: a response whose first token would be more rollouts old than this when it goes on is started
    anew instead. Longer responses than (max_staleness + 1) * round_tokens are then never learned from. None: none is;
    the first token is max_response_tokens / round_tokens - 1 rollouts old at most."""

    overlap: bool = False
    """vllm-server: while the policy learns from a rollout, the next one is sampled from the policy as it was before, so
    one step behind."""

    micro_batch_size: PositiveInt = execution(64)
    """Responses sampled and scored at a time; a matter of memory."""

    correction: Literal["token", "sequence-mask", "off"] = "token"
    """What is done about tokens that the engine found more or less likely than the policy does, or that an older policy
    sampled (`round_tokens`, `overlap`). token: each is weighted by w = pi_policy / pi_engine, at most `correction_cap`
    (truncated importance sampling). sequence-mask: by the product of w over its response, and by 0 where that is above
    the cap. With transformers w is 1 for the policy's own tokens."""

    correction_cap: Annotated[float, Field(ge=1)] = 2.0
    """Largest weight of a token."""


class CriticSettings(Settings):
    """The value model of `estimator: gae`. It starts from the reward model with its normalisation folded into the
    head; at 0 where there is none, or one that it cannot start from."""

    kind: Literal["auto", "separate", "adapter", "shared-head"] = "auto"
    """separate: a model of its own. adapter: an adapter and a head on the actor's frozen base. shared-head: a head on
    the actor's own hidden states. auto: adapter with `lora`, else separate."""

    optim: OptimSettings = OptimSettings(lr=9e-6, eps=1e-5)
    """The critic has its own optimiser; three times the actor's learning rate is a good start."""

    warmup_rollouts: Annotated[int, Field(ge=0)] | None = None
    """Rollouts on which only the critic is trained. None: 0 when it starts from a reward model, else 20, at most a
    tenth of the stage."""

    coef: PositiveFloat = 0.1
    """Weight of the value loss in the trunk that a shared head shares with the actor; the others share nothing."""


class PtxSettings(Settings):
    """Likelihood of demonstrations mixed into every optimiser step (Ouyang et al. 2022, PPO-ptx)."""

    data: Data
    """Demonstrations."""

    coef: PositiveFloat = 1.0
    """Weight of the mean negative log-likelihood per response token. The policy loss is a mean per token too; the
    published 27.8 multiplies another normaliser."""

    batch_size: PositiveInt = 64
    """Rows per optimiser step, over all processes."""

    max_length: PositiveInt = 1024
    """Longer rows are left out and counted, never cut."""


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

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where a GPU supports it, else float32. Log-probabilities are always float32."""

    fp32_lm_head: bool = False
    """Compute logits in float32 in a bfloat16 run: closer log-probabilities for a slower head."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    offload: list[Literal["reference", "reward"]] = execution([])
    """Frozen models that wait in CPU memory and are moved to the GPU for their pass only."""

    checkpoint: CheckpointSettings = CheckpointSettings()
    """Checkpoints, counted in rollouts."""

    samples_every: PositiveInt | None = execution(None)
    """Rollouts between entries of samples.jsonl. None: a tenth of the stage."""

    seed: int | None = None
    """None: the recipe's seed."""

    @property
    def has_critic(self) -> bool:
        """Whether values are estimated at all."""
        return self.estimator == WITH_CRITIC

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

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        problems = {**self._size_problems(), **self._rollout_problems(), **self._kl_problems()}
        problems |= self._reward_problems()
        problems |= self._critic_problems() if self.has_critic else self._critic_free_problems()
        refuse(problems | self._idle_problems())
        return self

    def _size_problems(self) -> dict[str, str]:
        problems = {}
        if self.responses % self.minibatches:
            problems["minibatches"] = f"{self.responses} responses per rollout are not a multiple of {self.minibatches}"
        if self.lora is not None and self.lora.dropout:
            problems["lora.dropout"] = "has to be 0: the ratio of new to old policy must be 1 before the first update"
        if self.overlong is not None and self.overlong.buffer > self.rollout.max_response_tokens:
            problems["overlong.buffer"] = (
                f"{self.overlong.buffer} is over rollout.max_response_tokens {self.rollout.max_response_tokens}"
            )
        return problems

    def _rollout_problems(self) -> dict[str, str]:
        rollout, problems = self.rollout, self._tail_problems()
        if rollout.overlap and rollout.engine != "vllm-server":
            problems["rollout.overlap"] = (
                f"needs rollout.engine: vllm-server; {rollout.engine} samples in the trainer's process, on weights "
                "that change while it learns"
            )
        if rollout.correction == "off" and (rollout.overlap or rollout.round_tokens is not None):
            problems["rollout.correction"] = (
                "off would learn from older policies' tokens as if they were the policy's own; use token, or leave "
                "rollout.round_tokens and rollout.overlap out"
            )
        return problems

    def _tail_problems(self) -> dict[str, str]:
        rollout = self.rollout
        most, each = rollout.max_response_tokens, rollout.round_tokens
        if each is None:
            idle = {
                "rollout.max_staleness": rollout.max_staleness is not None,
                "rollout.until_ended": rollout.until_ended,
            }
            return {name: "has no effect without rollout.round_tokens" for name, is_set in idle.items() if is_set}
        if each >= most or most % each:
            what = f"rollout.max_response_tokens {most} is not two or more times {each}; choose a part of it"
            return {"rollout.round_tokens": what}
        problems = {}
        if rollout.max_staleness is not None and rollout.max_staleness >= most // each - 1:
            problems["rollout.max_staleness"] = (
                f"has no effect: all responses end within {most // each} rollouts, so the oldest token is at most "
                f"{most // each - 1} old; choose a smaller number, or leave it out"
            )
        if rollout.until_ended == 1:
            problems["rollout.until_ended"] = (
                "1 waits for every response, so that none is carried over; choose a smaller share, or leave "
                "rollout.round_tokens out"
            )
        return problems

    def _kl_problems(self) -> dict[str, str]:
        problems = {}
        if self.kl.target is not None and self.kl.coef == 0:
            problems["kl.target"] = "moves kl.coef by a factor, and that of 0 stays 0; give kl.coef a start"
        waits = self.compares and self.rollout.round_tokens is not None
        most = self.responses * (self.rollout.responses_per_prompt if waits else 1)  # whose groups may end at once
        if self.kl.target is not None and most >= 5 * self.kl.horizon:
            problems["kl.horizon"] = f"{most} responses per rollout need one above {most // 5}"
        if self.kl.estimator == "k2" and self.whiten_advantages:
            problems["kl.estimator"] = (
                "whitening divides the scores by their spread and not a KL in the loss, so kl.coef would mean another "
                "thing at every rollout; set whiten_advantages: false"
            )
        return problems

    def _critic_problems(self) -> dict[str, str]:
        problems = {}
        if self.critic.kind == "adapter" and self.lora is None:
            problems["critic.kind"] = "adapter needs `lora`; without it the critic is separate or a shared-head"
        if (self.critic.warmup_rollouts or 0) >= self.rollouts:
            problems["critic.warmup_rollouts"] = (
                f"the policy would never be trained: there are {self.rollouts} rollouts"
            )
        return problems

    def _critic_free_problems(self) -> dict[str, str]:
        fields = {"critic", "lam", "lam_value", "lam_length", "clip.value"}
        fields |= set() if self.estimator == "reinforce++" else {"gamma"}
        what = f"a setting of the estimator {WITH_CRITIC}; {self.estimator} has no critic"
        if self.kind == "ppo":
            what += (
                f" (the stage `{self.estimator}` has its own defaults)" if self.estimator in {"rloo", "grpo"} else ""
            )
        problems = dict.fromkeys((name for name in sorted(fields) if self._is_changed(name)), what)
        if self.missing_eos.rule == "bootstrap":
            problems["missing_eos.rule"] = f"bootstrap needs a critic; {self.estimator} has none"
        if self.compares and self.rollout.responses_per_prompt < 2:
            problems["rollout.responses_per_prompt"] = (
                f"{self.estimator} compares the responses to one prompt; set it to 2 or more"
            )
        return problems

    def _idle_problems(self) -> dict[str, str]:
        """Settings that were changed and would do nothing."""
        needs = {
            "divide_by_std": ("estimator: grpo", self.estimator == "grpo"),
            "critic.coef": ("critic.kind: shared-head", not self.has_critic or self.critic.kind == "shared-head"),
            "kl.horizon": ("kl.target", self.kl.target is not None),
            "missing_eos.value": ("missing_eos.rule: replace or subtract", self.missing_eos.rule in VALUED_RULES),
        }
        return {
            name: f"has no effect without {other}"
            for name, (other, works) in needs.items()
            if not works and self._is_changed(name)
        }

    def _is_changed(self, name: str) -> bool:
        """Whether a setting, by its dotted key, differs from PPO's default."""
        ours, default = self, Config.model_construct()
        for key in name.split("."):
            ours, default = getattr(ours, key), getattr(default, key)
        return ours != default

    def _reward_problems(self) -> dict[str, str]:
        if not self.reward:
            return {"reward": "no term, so there is nothing to maximise"}
        problems = {}
        for name in self.reward:
            if name in INPUTS and name != DEFAULT_TERM:
                problems[f"reward.{name}"] = "the name of another input; choose another"
            elif not TERM_NAME.fullmatch(name):
                problems[f"reward.{name}"] = "the name of a term is made of letters, digits, - and _"
        return problems


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
    )


PPO = _spec("ppo", "PPO from a reward model", Config)
RLOO = _spec("rloo", "RLOO: no critic, several responses per prompt", RlooConfig)
GRPO = _spec("grpo", "GRPO: no critic, scores relative to their group", GrpoConfig)
