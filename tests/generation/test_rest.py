"""What vLLM gives up between rounds: never what the trainer needs, and taken back in an order that works."""

from __future__ import annotations

import pytest

from align.errors import ConfigError
from align.generation.rest import ALL, CACHE, NONE, choose_rest


@pytest.mark.parametrize(
    ("asked", "can_sleep", "num_shared", "chosen"),
    [
        ("auto", False, 0, NONE),
        ("auto", True, 0, ALL),
        ("auto", True, 3, CACHE),
        ("none", True, 0, NONE),
        ("none", False, 3, NONE),
        ("cache", True, 0, CACHE),
        ("cache", True, 3, CACHE),
        ("all", True, 0, ALL),
    ],
)
def test_what_is_given_up(asked, can_sleep, num_shared, chosen):
    """As much as is asked for or, with auto, as much as nobody else needs."""
    assert choose_rest(asked, can_sleep=can_sleep, num_shared=num_shared) is chosen


def test_shared_weights_are_not_given_up():
    """They are the trainer's: a rest that loses weights is refused, and is not chosen."""
    with pytest.raises(ConfigError, match=r"rollout\.sleep all: 3 weights .* shares with the policy; use cache"):
        choose_rest("all", can_sleep=True, num_shared=3)
    assert not choose_rest("auto", can_sleep=True, num_shared=1).loses_weights


@pytest.mark.parametrize("asked", ["cache", "all"])
def test_a_device_that_cannot_sleep_is_told(asked):
    with pytest.raises(ConfigError, match=rf"rollout\.sleep {asked}: vLLM gives up memory on a GPU only; use auto"):
        choose_rest(asked, can_sleep=False)


@pytest.mark.parametrize("rest", [NONE, CACHE, ALL], ids=lambda rest: rest.name)
def test_what_goes_down_comes_back_in_order(rest):
    """Weights, where they are lost (level 1 or 2), have memory before they are written; the cache takes its own only
    after that; and both are back where they were given up. Level 0 and the release of the cache touch no weight."""
    names = [name for name, _ in rest.down]
    levels = [given["level"] for name, given in rest.down if name == "sleep"]
    lost = {"weights"} if max(levels, default=0) else set()
    lost |= {"kv_cache"} if lost or "release_kv_cache_memory" in names else set()
    before, after = ({tag for _, given in calls for tag in given["tags"]} for calls in (rest.before, rest.after))
    assert before == lost - {"kv_cache"} and after == lost - {"weights"}
    assert rest.loses_weights == ("weights" in lost)
