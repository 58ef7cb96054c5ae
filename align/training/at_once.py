"""Computations that have nothing in common, at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def at_once(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of calls that share no weights, in order; an error of any of them is raised when all have ended.

    Each runs in a thread of its own with its share of torch's threads: operations of a small model are too short to be
    cut over several cores, but two models keep two cores busy. Where torch has one thread, one call after the other.
    What is set per thread, as gradient mode and autocast are, has to be set inside a call.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(calls))
    if workers < 2:
        return [call() for call in calls]
    torch.set_num_threads(threads // workers)  # new threads take it over
    try:
        with ThreadPoolExecutor(workers) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]
    finally:
        torch.set_num_threads(threads)
