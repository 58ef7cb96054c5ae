"""What a reward function or endpoint is given, and what it may give back. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from align.data.faults import show
from align.data.rows import Message
from align.errors import ConfigError, NumericError, Problem

FLOAT32_MAX = 3.4028234663852886e38
WANTED = "wanted a list with one number per response, or one list per response with a number for each of its tokens"


@dataclass(frozen=True)
class RewardBatch:
    """B responses to be scored, and the prompts they answer."""

    prompts: list[str]
    """Text of the last message of each prompt: the user's, unless a tool answered."""
    messages: list[list[Message]]
    """The whole prompts: {"role": "user", "content": "Hello"} and so on."""
    responses: list[str]
    """Decoded, without control tokens."""
    response_ids: list[list[int]]
    """Token ids of each response, with the one that ended it: a process reward gives a number for each of them."""
    finished: list[bool]
    """Whether it ended on its own; False when it was cut."""

    def __len__(self) -> int:
        return len(self.responses)

    def part(self, start: int, stop: int) -> RewardBatch:
        """The responses from `start` up to `stop`."""
        return RewardBatch(**{field.name: getattr(self, field.name)[start:stop] for field in fields(self)})


RewardFunction = Callable[[RewardBatch], Sequence[float] | Sequence[Sequence[float]]]
"""One number per response, or (a process reward) one per response token."""

Values = list[float] | list[list[float]]
"""What a reward function or endpoint gave, checked."""


def probe(messages: Sequence[Message], stop_id: int) -> RewardBatch:
    """One response that any policy may give, the empty one: what a reward is tried on before a run."""
    return RewardBatch([messages[-1]["content"]], [list(messages)], [""], [[stop_id]], [True])


def checked(given: Any, batch: RewardBatch, where: str) -> Values:
    """`given` as plain numbers. Lists, tuples, arrays and tensors are taken.

    Raises ConfigError for a wrong count, length or type, and NumericError for a number that is not finite in float32,
    naming the response; responses and tokens are counted from 1.
    """
    rows = _plain(given)
    if not isinstance(rows, list):
        raise ConfigError(Problem(where, f"gave {_kind(rows)}", WANTED))
    if len(rows) != len(batch):
        raise ConfigError(Problem(where, f"gave {len(rows)} scores for {len(batch)} responses", WANTED))
    rows = [_plain(row) for row in rows]
    names = [f"response {number} of {len(batch)} ({show(text)})" for number, text in enumerate(batch.responses, 1)]
    if not any(isinstance(row, list) for row in rows):
        return [_number(row, where, name) for row, name in zip(rows, names, strict=True)]
    for row, name, ids in zip(rows, names, batch.response_ids, strict=True):
        if not isinstance(row, list):
            raise ConfigError(Problem(where, f"{name} got {_kind(row)} where others got a list", WANTED))
        if len(row) != len(ids):
            raise ConfigError(Problem(where, f"{name} got {len(row)} scores for {len(ids)} tokens", WANTED))
    return [
        [_number(value, where, f"token {token} of {name}") for token, value in enumerate(row, 1)]
        for row, name in zip(rows, names, strict=True)
    ]


def _plain(value: Any) -> Any:
    """Arrays and tensors as Python lists and numbers, other sequences as lists, the rest as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value


def _number(value: Any, where: str, name: str) -> float:
    value = _plain(value)
    if not isinstance(value, Real):
        raise ConfigError(Problem(where, f"{name} got {_kind(value)}", "wanted a number"))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= FLOAT32_MAX:
        raise NumericError(f"{where}: {name} got {number}: a reward is a finite float32 number")
    return number


def _kind(value: Any) -> str:
    """What a value is, in words, for a message."""
    if value is None:
        return "None"
    if isinstance(value, Real):
        return "a number"
    if isinstance(value, Mapping):
        return "a dict"
    return f"text, {show(value)}" if isinstance(value, str) else f"a {type(value).__name__}"
