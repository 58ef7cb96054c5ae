"""The split into training and held-out rows: by prompt, and by nothing but the prompt's text."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from align.data.rows import Message, Row
from align.records import canonical_json


class Keyed(NamedTuple):
    """A row and the key of its prompt."""

    row: Row
    key: str


def prompt_key(prompt: Sequence[Message]) -> str:
    """The same for prompts that differ only in system message, space around a text, or Unicode form."""
    return canonical_json([[turn["role"], text_key(turn["content"])] for turn in prompt if turn["role"] != "system"])


def text_key(text: str) -> str:
    """The text without the space around it, in Unicode form NFC."""
    return unicodedata.normalize("NFC", text).strip()


def share(key: str) -> float:
    """A number in [0, 1) that depends only on the key: its sha256 modulo 2^32, divided by 2^32."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[-4:]) / 2**32


def split(rows: Sequence[Keyed], held_out: float) -> tuple[list[Keyed], list[Keyed]]:
    """Training and held-out rows, each in the order given: a prompt is held out iff `share(key) < held_out`.

    A small file can leave a side empty. Then the prompt nearest to it moves over, so that there is always
    something to train on and, from two prompts on, something to measure on.
    """
    shares = {row.key: share(row.key) for row in rows}
    if held_out == 0 or not shares:
        return list(rows), []
    by_share = sorted(shares, key=lambda key: (shares[key], key))
    held = {key for key in by_share if shares[key] < held_out}
    if len(held) == len(by_share):
        held.remove(by_share[-1])
    if not held and len(by_share) > 1:
        held.add(by_share[0])
    return [row for row in rows if row.key not in held], [row for row in rows if row.key in held]
