"""Prompts of evaluation sets found again in training data."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from align.data.rows import Demonstration, Document, Message, Prompt, Row

NUM_WORDS = 13
"""Words in a row that two texts do not share by chance (Brown et al. 2020, appendix C)."""

WORD = re.compile(r"\w+")


class Contamination:
    """The prompts of evaluation sets."""

    def __init__(self) -> None:
        self._prompts: dict[bytes, str] = {}
        self._runs: dict[tuple[str, ...], str] = {}

    def add(self, prompt: Prompt, key: bytes) -> None:
        """Adds a prompt that is measured on."""
        self._prompts.setdefault(key, prompt.source)
        for run in _runs(_users(prompt.messages)):
            self._runs.setdefault(run, prompt.source)

    def reason(self, row: Row, key: bytes) -> str | None:
        """Why a row may not be trained on; None when it may."""
        return self.twin(key) or self.overlap(row)

    def twin(self, key: bytes) -> str | None:
        """Where a prompt with this key is measured on, in words."""
        place = self._prompts.get(key)
        return place and f"its prompt is in an evaluation set, at {place}"

    def overlap(self, row: Row) -> str | None:
        """Where a prompt that shares words with `row` is measured on, in words."""
        found = next((self._runs[run] for run in _runs(_prompt_text(row)) if run in self._runs), None)
        return found and f"its prompt shares {NUM_WORDS} words in a row with an evaluation set, at {found}"


def _prompt_text(row: Row) -> str:
    if isinstance(row, Document):
        return row.text
    return _users(row.messages if isinstance(row, Demonstration | Prompt) else row.prompt)


def _users(messages: Sequence[Message]) -> str:
    return "\n".join(turn["content"] for turn in messages if turn["role"] == "user")


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    """All runs of NUM_WORDS words, without case, accents of form, and punctuation."""
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return (tuple(words[start : start + NUM_WORDS]) for start in range(len(words) - NUM_WORDS + 1))
