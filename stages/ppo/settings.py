"""The groups of settings of PPO and its family, by what they are about."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from align.recipe.data_settings import Data
from align.recipe.engine_settings import EngineSettings
from align.recipe.settings import Fraction, Settings, execution
from align.recipe.training_settings import OptimSettings

NonNegative = Annotated[float, Field(ge=0)]


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
