"""Canonical rows: whatever the shape of a file, a stage gets one of these five.

Texts are kept byte for byte as they were in the file. `source` is `file.jsonl:12`: the line of a JSONL or CSV
file, the row of a JSON array or parquet file, counted from 1.
"""

from __future__ import annotations

from dataclasses import dataclass

Message = dict[str, str]
"""{"role": "user", "content": "Hello"}; roles are system, user, assistant and tool."""


@dataclass(frozen=True)
class Demonstration:
    """A conversation that ends with the assistant's answer."""

    messages: list[Message]
    source: str


@dataclass(frozen=True)
class Preference:
    """Two answers to the same prompt, of which `chosen` is the better one."""

    prompt: list[Message]
    chosen: str
    rejected: str
    source: str


@dataclass(frozen=True)
class Judgement:
    """One answer to a prompt, and whether it was judged good."""

    prompt: list[Message]
    response: str
    is_good: bool
    source: str


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant."""

    messages: list[Message]
    source: str


@dataclass(frozen=True)
class Document:
    """Plain text."""

    text: str
    source: str


Row = Demonstration | Preference | Judgement | Prompt | Document


def asked(row: Demonstration | Preference | Judgement) -> Prompt:
    """What was answered in a row."""
    messages = row.messages[:-1] if isinstance(row, Demonstration) else row.prompt
    return Prompt(messages, row.source)
