"""What a reward is made of, as the recipe writes it. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from align.recipe.settings import Settings, execution, function, source

DEFAULT_TERM = "reward"
"""Name of the only term when the recipe does not name any."""


class RewardTerm(Settings):
    """One term of the reward: a reward model, an ensemble of them, a Python function, or an HTTP endpoint."""

    model: str | list[str] | None = source()
    """A reward model: a stage, a local folder or a hub id; a list is an ensemble. None, with neither function nor url:
    the `reward` stage."""

    combine: Literal["mean", "min", "mean-variance"] = "mean"
    """One score from an ensemble's (Coste et al. 2024). mean-variance: mean - variance_coef * variance."""

    variance_coef: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the ensemble's disagreement under mean-variance."""

    function: str | None = function()
    """`module:function` of a reward function: see align.rewards.batch."""

    url: str | None = None
    """Endpoint that scores by HTTP POST: see align.rewards.remote."""

    timeout: PositiveFloat = execution(30.0)
    """Seconds until an unanswered request counts as failed."""

    retries: Annotated[int, Field(ge=0)] = execution(4)
    """Further tries of a failed request, each after twice the wait of the one before."""

    batch_size: PositiveInt = execution(64)
    """Responses per request."""

    token_variable: str | None = execution(None)
    """Name of the environment variable that holds the endpoint's bearer token. The token itself is never stored."""

    weight: float = 1.0
    """What the term is multiplied by before terms are added up."""

    @model_validator(mode="after")
    def _one_kind(self) -> RewardTerm:
        given = [name for name in ("model", "function", "url") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a reward term is one of model, function and url; {' and '.join(given)} are set")
        if self.model == []:
            raise ValueError("model: an ensemble needs at least one reward model")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} does not start with http:// or https://")
        return self

    @property
    def is_model(self) -> bool:
        """Whether it is scored by one or more reward models."""
        return self.function is None and self.url is None

    def inputs(self, term: str) -> dict[str, str | None]:
        """The reward models of the term called `term`, by the name of the input: `term`, or `term.1`, `term.2` ..."""
        if not self.is_model:
            return {}
        if isinstance(self.model, list):
            return {f"{term}.{number}": name for number, name in enumerate(self.model, 1)}
        return {term: self.model}


def reward_terms(value: Any) -> Any:
    """`reward: X` and `reward: [X, Y]` stand for a single term; None for the default one."""
    if value is None:
        return {DEFAULT_TERM: {}}
    if isinstance(value, str | list):
        return {DEFAULT_TERM: {"model": value}}
    return value
