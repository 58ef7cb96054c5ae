"""The texts of a row, and what simple patterns say about them: personal data and scripts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from align.data.checking.findings import Findings
from align.data.rows import Demonstration, Document, Judgement, Preference, Prompt, Row

# Every repetition has a limit, so no text makes them slow.
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
PHONE = re.compile(r"(?<![\w-])(?:\+\d(?:[ -]?\d){7,14}|(?:\(\d{3}\) ?|\d{3}[ -])\d{3}[ -]\d{4})(?![\w-])")
CARD = re.compile(r"(?<![\w-])[3-6](?:[ -]?\d){12,18}(?![\w-])")
SECRET = re.compile(
    r"(?<!\w)(?:hf_[A-Za-z0-9]{30}|sk-[\w-]{20}|gh[pousr]_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}(?!\w))"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----"
)
LABEL = re.compile(r"\b(?:chosen|rejected|preferred|annotator|label|score|rating)(?:[ _-]?\w{1,20})?\s{0,3}[:=]", re.I)
HIDDEN = re.compile("[\x00\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffd]")
"""No width (but for joiners, which emoji have), another direction, another kind of newline, the mark of lost bytes."""
REPEATED = re.compile(r"(.)\1{499}", re.DOTALL)
LONGEST_WORD = 1000
"""Characters without space that are text; not of scripts that are written without spaces."""
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


def is_blob(text: str) -> bool:
    """Whether `text` has a part that is no text: encoded bytes, minified code, one character again and again."""
    if len(text) < min(LONGEST_WORD, 500):
        return False
    return any(len(word) > LONGEST_WORD and word.isascii() for word in text.split()) or bool(REPEATED.search(text))


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


class Patterns:
    """Personal data, secrets, what is no text or not seen, and labels in prompts. What was found is not repeated."""

    def __init__(self, findings: Findings):
        self._findings = findings

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Looks at a row."""
        for kind in dict.fromkeys(kind for text in texts(row) for kind in personal_data(text)):
            self._findings.row(kind, position, "seems to be in its text")
        if any(SECRET.search(text) for text in texts(row)):
            self._findings.row("secret", position, "a key or token seems to be in its text")
        if any(map(is_blob, texts(row))):
            self._findings.row("blob", position, "a part of it is no text")
        if hidden := sorted({letter for text in texts(row) for letter in HIDDEN.findall(text)}):
            named = ", ".join(f"U+{ord(letter):04X}" for letter in hidden)
            self._findings.row("hidden character", position, f"its text has {named}")
        if isinstance(row, Preference | Judgement) and any(LABEL.search(turn["content"]) for turn in row.prompt):
            self._findings.row("label in prompt", position, "its prompt names a label or a score")

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
