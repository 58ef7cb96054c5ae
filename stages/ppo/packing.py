"""Which rows a step takes, and how they are cut into forward and backward passes.

The cut is a matter of memory and speed, never of results: losses are sums that are divided once, so any cover of the
rows gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def visited(total: int, count: int, step: int, seed_of_pass: Callable[[int], int]) -> list[int]:
    """Row numbers of step number `step` (from 0), `count` of them: see `stretch`."""
    return stretch(total, step * count, (step + 1) * count, seed_of_pass)


def stretch(total: int, first: int, last: int, seed_of_pass: Callable[[int], int]) -> list[int]:
    """Row numbers at the places `first` up to, not including, `last` of an endless stream: all `total` rows are visited
    once per pass, in a fresh order that follows from the pass alone. A stretch may reach into the next pass, or over
    several."""
    order: list[int] = []
    for number in range(first // total, (last - 1) // total + 1):
        generator = torch.Generator().manual_seed(seed_of_pass(number))
        order += torch.randperm(total, generator=generator).tolist()
    start = first % total
    return order[start : start + last - first]


def micro_batches(prompts: Tensor, responses: Tensor, rows: int, tokens: int | None) -> list[Tensor]:
    """Row numbers, every one once, in batches of at most `rows`. `prompts` and `responses` (B,) are the lengths of each
    row's two parts, which are padded apart.

    With `tokens`, a batch also has at most that many, padding included; a row that is longer is a batch of its own.
    Rows of similar length are then together, the longest first: if memory is short, the first batch says so.
    """
    order = torch.arange(len(responses), device=responses.device)
    if tokens is not None:
        order = (prompts + responses).argsort(descending=True, stable=True)
    batches = []
    while len(order):
        size = rows if tokens is None else min(rows, _fitting(prompts[order], responses[order], tokens))
        batches.append(order[:size])
        order = order[size:]
    return batches


def _fitting(prompts: Tensor, responses: Tensor, tokens: int) -> int:
    """How many of the first rows make a padded batch of at most `tokens`; at least one."""
    width = prompts.cummax(0).values + responses.cummax(0).values
    counts = torch.arange(1, len(prompts) + 1, device=prompts.device)
    return max(1, int((counts * width <= tokens).sum()))
