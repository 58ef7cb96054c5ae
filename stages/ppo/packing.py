"""How the rows of a minibatch are cut into forward and backward passes: a matter of memory and speed, never of results.

Losses are sums that are divided once, so any cover of the rows gives the same gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def micro_batches(lengths: Tensor, rows: int, tokens: int | None) -> list[Tensor]:
    """Row numbers, every one once, in batches of at most `rows`; lengths (B,) count the tokens of each row, >= 1.

    With `tokens`, a batch also has at most that many, padding included (its rows times its longest); a row that is
    longer is a batch of its own. Rows of similar length are then together, the longest first: if memory is short, the
    first batch says so.
    """
    order = torch.arange(len(lengths), device=lengths.device)
    if tokens is not None:
        order = lengths.argsort(descending=True, stable=True)
    batches = []
    while len(order):
        size = rows if tokens is None else min(rows, max(1, tokens // int(lengths[order[0]])))
        batches.append(order[:size])
        order = order[size:]
    return batches
