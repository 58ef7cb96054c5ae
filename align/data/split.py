"""The split into training and held-out rows: by prompt, and by nothing but the prompt's text."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from align.data.rows import Message, Prompt
from align.records import canonical_json

WIDTH = 16
"""Bytes of a key: the end of a sha256. No two prompts of any data set share one."""


class Keys(Sequence[bytes]):
    """The keys of many rows, without an object for each."""

    def __init__(self, keys: Iterable[bytes] = ()):
        self._bytes = bytearray().join(keys)

    def append(self, key: bytes) -> None:
        """Adds a key at the end."""
        self._bytes += key

    def __len__(self) -> int:
        return len(self._bytes) // WIDTH

    def __getitem__(self, index):  # type: ignore[override]  # a slice gives keys too
        numbers = range(len(self))[index]
        return Keys(map(self._key, numbers)) if isinstance(index, slice) else self._key(numbers)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[bytes]:
        return map(self._key, range(len(self)))

    def _key(self, number: int) -> bytes:
        return bytes(self._bytes[number * WIDTH : (number + 1) * WIDTH])


def prompt_key(prompt: Sequence[Message]) -> str:
    """The same for prompts that differ only in system message, space around a text, or Unicode form."""
    return canonical_json([[turn["role"], text_key(turn["content"])] for turn in prompt if turn["role"] != "system"])


def text_key(text: str) -> str:
    """The text without the space around it, in Unicode form NFC."""
    return unicodedata.normalize("NFC", text).strip()


def digest(key: str) -> bytes:
    """What stands for a key of any length: the last WIDTH bytes of its sha256."""
    return hashlib.sha256(key.encode()).digest()[-WIDTH:]


class Place(NamedTuple):
    """The key of a prompt, and where it is: all that a search for leaks needs of it."""

    key: bytes
    source: str


def places(prompts: Iterable[Prompt]) -> Iterator[Place]:
    """The keys and places of prompts."""
    return (Place(digest(prompt_key(prompt.messages)), prompt.source) for prompt in prompts)


def share(key: bytes) -> float:
    """A number in [0, 1) that depends only on the key: its sha256 modulo 2^32, divided by 2^32."""
    return int.from_bytes(key[-4:]) / 2**32


def split(keys: Sequence[bytes], held_out: float) -> tuple[array[int], array[int]]:
    """Positions of training and held-out rows, each in order: a prompt is held out iff `share(key) < held_out`.

    A small file can leave a side empty. Then the prompt nearest to it moves over, so that there is always
    something to train on and, from two prompts on, something to measure on.
    """
    if held_out == 0 or not len(keys):
        return array("q", range(len(keys))), array("q")
    low, high = min(keys, key=_order), max(keys, key=_order)
    moved_in = low if share(low) >= held_out and low != high else None
    moved_out = high if share(high) < held_out else None
    train, held = array("q"), array("q")
    for position, key in enumerate(keys):
        is_held = (share(key) < held_out or key == moved_in) and key != moved_out
        (held if is_held else train).append(position)
    return train, held


def _order(key: bytes) -> tuple[float, bytes]:
    return share(key), key
