"""Calls that run at the same time, each with its share of the threads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from threading import Barrier

import pytest
import torch

from align.training.at_once import at_once


@pytest.fixture
def four_threads() -> Iterator[None]:
    """torch may use four threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_calls_meet(four_threads):
    """Two calls that wait for each other can only end if both are at work; each has two of the four threads."""
    barrier = Barrier(2, timeout=30)

    def call(name: str) -> tuple[str, int]:
        barrier.wait()
        return name, torch.get_num_threads()

    assert at_once([partial(call, "a"), partial(call, "b")]) == [("a", 2), ("b", 2)]
    assert torch.get_num_threads() == 4


def test_one_thread_is_one_after_the_other(four_threads):
    """The user's limit holds."""
    torch.set_num_threads(1)
    order = []

    def call(name: str) -> None:
        order.append(f"{name} begins")
        order.append(f"{name} ends")

    at_once([partial(call, "a"), partial(call, "b")])
    assert order == ["a begins", "a ends", "b begins", "b ends"]


def test_an_error_is_raised_when_all_have_ended(four_threads):
    """And torch has its threads back."""
    ended = []

    def fail() -> None:
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        at_once([fail, lambda: ended.append(True)])
    assert ended == [True] and torch.get_num_threads() == 4
