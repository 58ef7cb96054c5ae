"""What vLLM in the stage's process gives up while the policy is trained, and in which order it takes that back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from align.errors import ConfigError

Call = tuple[str, dict[str, Any]]
"""A method of vLLM's `LLM` by name, and what it is given."""


@dataclass(frozen=True)
class Rest:
    """A way to rest, as calls in order. Weights are handed over between `before` and `after`: they need memory to be
    written to, and the cache is not to take it first."""

    name: Literal["none", "cache", "all"]
    summary: str
    down: tuple[Call, ...] = ()
    before: tuple[Call, ...] = ()
    after: tuple[Call, ...] = ()

    @property
    def loses_weights(self) -> bool:
        """Whether they have to be handed over again before it can sample."""
        return bool(self.before)


NONE = Rest("none", "")
CACHE = Rest(
    "cache",
    "its cache given up while training",
    down=(("sleep", {"level": 0}), ("release_kv_cache_memory", {})),  # level 0 only stops the scheduler
    after=(("wake_up", {"tags": ["kv_cache"]}),),
)
ALL = Rest(
    "all",
    "its weights and cache given up while training",
    down=(("sleep", {"level": 2}),),  # keeps buffers, which no hand-over writes, and discards weights
    before=(("wake_up", {"tags": ["weights"]}),),
    after=(("wake_up", {"tags": ["kv_cache"]}),),
)


def choose_rest(asked: str, *, can_sleep: bool, num_shared: int = 0) -> Rest:
    """How an engine rests that shares `num_shared` weights with the policy. Raises ConfigError for what it cannot.

    Shared weights are the trainer's: they stay where they are. Where none is shared a hand-over writes all of them
    anyway, so that `auto` gives them up.
    """
    if asked == "none" or (asked == "auto" and not can_sleep):
        return NONE
    if not can_sleep:
        raise ConfigError(f"rollout.sleep {asked}: vLLM gives up memory on a GPU only; use auto or none")
    if asked == "all" and num_shared:
        raise ConfigError(
            f"rollout.sleep all: {num_shared} weights are in memory that the engine shares with the policy; use cache"
        )
    return CACHE if asked == "cache" or num_shared else ALL
