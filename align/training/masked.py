"""Sums and moments over the valid tokens of padded batches.

B rows, T tokens of the response. A mask is bool, True = counts, and is made from lengths, never from token
ids. Whatever sits at a masked slot, NaN included, is dropped with `torch.where`: multiplying by the mask
would keep the NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a 1-D float64 tensor over all processes."""


def identity(sums: Tensor) -> Tensor:
    """The reduction of a single process."""
    return sums


class Processes(NamedTuple):
    """The sum and the maximum of each number of a 1-D tensor over all processes."""

    sum: Reduce
    max: Reduce


ALONE = Processes(identity, identity)


def largest(x: Tensor, processes: Processes = ALONE) -> float:
    """The largest number of x over all processes, of which some may have none; -inf when all have none."""
    own = x.max().double() if x.numel() else torch.tensor(-torch.inf, dtype=torch.float64, device=x.device)
    return float(processes.max(own[None]))


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """lengths (B,) -> bool (B, width): the first `lengths` slots of each row are valid."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the valid slots of x; `mask` has its shape. A scalar, or the sum along `dim`."""
    return torch.where(mask, x, 0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid slots of x; `mask` has its shape. NaN when nothing is valid."""
    return masked_sum(x, mask) / mask.sum()


class Moments(NamedTuple):
    """Count, sum and sum of squares: they add up over processes, which means and variances do not."""

    count: float
    total: float
    squares: float

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else float("nan")

    @property
    def variance(self) -> float:
        """Biased: divided by the count."""
        return max(self.squares / self.count - self.mean**2, 0.0) if self.count else float("nan")

    @property
    def standard_error(self) -> float:
        """Of the mean. Infinite below two values: nothing is known of the spread."""
        return (self.variance / (self.count - 1)) ** 0.5 if self.count > 1 else float("inf")


def moments(x: Tensor, mask: Tensor | None = None, reduce: Reduce = identity) -> Moments:
    """Moments of the valid slots of x over all processes. In float64: a difference of squares cancels."""
    valid = (x if mask is None else x[mask]).double()
    count = torch.tensor(float(valid.numel()), dtype=torch.float64, device=x.device)
    return Moments(*reduce(torch.stack([count, valid.sum(), valid.square().sum()])).tolist())


def whiten(x: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """(x - mean) / std over ALL valid slots of all processes; 0 at masked slots.

    Biased variance, eps 1e-8 inside the root (Ziegler et al. 2019). With fewer than two values or no spread
    there is nothing to scale by, and x is returned as it is: at the optimum advantages are rounding noise,
    not signal.
    """
    stats = moments(x, mask, reduce)
    if stats.count < 2 or stats.variance**0.5 < 1e-6:
        return torch.where(mask, x, 0)
    return torch.where(mask, (x - stats.mean) / (stats.variance + 1e-8) ** 0.5, 0)


def correlation(x: Tensor, y: Tensor, reduce: Reduce = identity) -> float:
    """Pearson correlation of two 1-D tensors over all processes; NaN when one of them is constant."""
    x, y = x.double(), y.double()
    ones = torch.ones_like(x)
    n, sx, sy, sxx, syy, sxy = reduce(torch.stack([term.sum() for term in (ones, x, y, x * x, y * y, x * y)])).tolist()
    spread = (n * sxx - sx * sx) * (n * syy - sy * sy)
    return (n * sxy - sx * sy) / spread**0.5 if spread > 0 else float("nan")
