"""Measurements of engines that take turns, and their ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One measurement of an engine."""

    seconds: float
    floor: float
    """Seconds that the same tokens need at least."""
    lengths: list[int]
    """Generated tokens of each response."""
    cores: float
    """That were used."""

    @property
    def speed(self) -> float:
        """Generated tokens per second."""
        return sum(self.lengths) / self.seconds


Round = Mapping[str, Turn]
"""One turn of each engine, by its name."""


def ratios(rounds: Sequence[Round], engine: str, base: str) -> list[float]:
    """Speed of an engine over that of another, in each round: of neighbours in time."""
    return [turns[engine].speed / turns[base].speed for turns in rounds]
