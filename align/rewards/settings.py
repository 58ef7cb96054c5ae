"""What a reward is made of, as the recipe writes it. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

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
            raise ValueError("an ensemble needs at least one reward model")
        if self.url is not None:
            _check_url(self.url)
        if not isinstance(self.model, list) and self.combine != "mean":
            raise ValueError(f"combine {self.combine} is for an ensemble, a list of reward models")
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


def _check_url(url: str) -> None:
    """Raises ValueError without the URL, which may hold a secret and is then not for showing."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("url is not http:// or https:// and the name of a host, with or without a port and a path")
    if "@" in parts.netloc:
        raise ValueError("url holds a user name or password, and a recipe is no place for one; see token_variable")


def reward_terms(value: Any) -> Any:
    """`reward: X` and `reward: [X, Y]` stand for a single term; None for the default one."""
    if value is None:
        return {DEFAULT_TERM: {}}
    if isinstance(value, str | list):
        return {DEFAULT_TERM: {"model": value}}
    return value
