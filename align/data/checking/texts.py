"""The texts of a row, and what simple patterns say about them: personal data and scripts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from align.data.checking.findings import Findings
from align.data.rows import Demonstration, Document, Judgement, Prompt, Row

# Every repetition has a limit, so no text makes them slow.
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
PHONE = re.compile(r"(?<![\w-])(?:\+\d(?:[ -]?\d){7,14}|(?:\(\d{3}\) ?|\d{3}[ -])\d{3}[ -]\d{4})(?![\w-])")
CARD = re.compile(r"(?<![\w-])[3-6](?:[ -]?\d){12,18}(?![\w-])")
LETTERS = 200
"""Letters of a row that are looked at for its script."""
USUAL = 0.9
"""Share of rows in one script from which on the others are worth a look."""
JAPANESE = ("HIRAGANA", "KATAKANA")


def texts(row: Row) -> list[str]:
    """The texts of a row in order: of a preference, the last two are the chosen and the rejected answer."""
    if isinstance(row, Document):
        return [row.text]
    if isinstance(row, Demonstration | Prompt):
        return [turn["content"] for turn in row.messages]
    answers = [row.response] if isinstance(row, Judgement) else [row.chosen, row.rejected]
    return [*(turn["content"] for turn in row.prompt), *answers]


def personal_data(text: str) -> list[str]:
    """Which kinds of personal data `text` seems to hold."""
    found = ["e-mail address"] if "@" in text and EMAIL.search(text) else []
    if PHONE.search(text):
        found.append("phone number")
    if any(is_card_number(match[0]) for match in CARD.finditer(text)):
        found.append("card number")
    return found


def is_card_number(text: str) -> bool:
    """Whether the digits of `text` have a right check digit (Luhn): doubling every second one from the right, the sum
    of all digits is divisible by ten."""
    digits = [int(letter) for letter in reversed(text) if letter.isdigit()]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def script(said: Sequence[str]) -> str:
    """The script of most of the first letters, such as `latin`; empty without letters."""
    if all(map(str.isascii, said)):  # most texts, so it is worth being fast
        return "latin" if any(letter.isalpha() for text in said for letter in text) else ""
    letters = list(islice((letter for text in said for letter in text if letter.isalpha()), LETTERS))
    if not letters:
        return ""
    names = (unicodedata.name(letter, "UNKNOWN").split(" ")[0] for letter in letters)
    ((most, _),) = Counter("CJK" if name in JAPANESE else name for name in names).most_common(1)
    return most.lower()


class PersonalData:
    """Hints at personal data. What was found is not repeated in the message."""

    def __init__(self, findings: Findings):
        self._findings = findings

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Looks at a row."""
        for kind in dict.fromkeys(kind for text in texts(row) for kind in personal_data(text)):
            self._findings.row(kind, position, "seems to be in its text")

    def finish(self) -> dict[str, Any]:
        """Nothing is left to tell."""
        return {}


class Scripts:
    """Counts the scripts that rows are written in; few rows in another one may be strays."""

    def __init__(self, findings: Findings):
        self._findings = findings
        self._names: dict[str, int] = {}
        self._rows = bytearray()

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Looks at a row."""
        name = script(texts(row))
        self._rows.append(min(self._names.setdefault(name, len(self._names)), 255))

    def finish(self) -> dict[str, Any]:
        """Tells the strays, and how many rows there are of each script."""
        names = list(self._names)
        counted = Counter(self._rows)
        most = max(counted, key=counted.__getitem__, default=0)
        if counted and counted[most] >= USUAL * len(self._rows):
            for position, number in enumerate(self._rows):
                if number != most and names[number]:
                    self._findings.row("other script", position, f"its letters are {names[number]}")
        return {"scripts": {names[number] or "no letters": count for number, count in counted.most_common()}}
