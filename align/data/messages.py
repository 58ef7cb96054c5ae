"""Reading texts, prompts, answers and conversations out of a row, with every check they need."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from align.data.faults import RowFault, escaped, quoted, show, type_name
from align.data.readers import Cell
from align.data.rows import Message
from align.recipe.nearest import did_you_mean

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
    "user": "user",
    "assistant": "assistant",
}
# Which roles may come before each role; None is the start of the conversation.
COMES_AFTER: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
"""Starts a turn of a conversation written as one text, as in Anthropic's HH."""
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
VERDICTS = {"true": True, "false": False, "1": True, "0": False}


def text(row: Mapping[str, object], column: str, inside: str = "") -> str:
    """The text of a column that must have one. `inside` says which part of the row `row` is, where it is not all."""
    return _checked_text(_present(row, column, inside), _named(column, inside))


def optional_text(row: Mapping[str, object], column: str) -> str | None:
    """The text of a column that may be absent, null or blank: then None."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _checked_text(value, f"`{column}`")


def number(row: Mapping[str, object], column: str, inside: str = "") -> float:
    """A finite number. Text is none, except in a CSV file."""
    value, name = _present(row, column, inside), _named(column, inside)
    if isinstance(value, Cell):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowFault("wrong type", f"{name} is {type_name(value)} ({show(value)}); wanted a number")
    if not math.isfinite(value):
        raise RowFault("wrong type", f"{name} is {value}; wanted a finite number")
    return float(value)


def choice(row: Mapping[str, object], column: str, options: Sequence[int]) -> int:
    """A whole number that is one of `options`."""
    value = number(row, column)
    if value not in options:
        what = f"`{column}` is {show(row[column])}; wanted {' or '.join(map(str, options))}"
        raise RowFault("not one of the values", what)
    return int(value)


def verdict(row: Mapping[str, object], column: str) -> bool:
    """True or false, also written as 1 or 0."""
    value = _present(row, column)
    word = str(value).lower() if isinstance(value, bool | int | Cell) else ""
    if word not in VERDICTS:
        raise RowFault("wrong type", f"`{column}` is {type_name(value)} ({show(value)}); wanted true or false")
    return VERDICTS[word]


def prompt(row: Mapping[str, object], column: str) -> list[Message]:
    """A prompt given as text (one user message), as a transcript that waits for the assistant, or as messages that end
    with the user or a tool."""
    value = row.get(column)
    if isinstance(value, str):
        if TRANSCRIPT.match(value) and value.rstrip().endswith("\n\nAssistant:"):
            return checked_prompt(transcript(value.rstrip().removesuffix("\n\nAssistant:"), column), column)
        return [user(text(row, column))]
    return checked_prompt(messages(row, column), column)


def answer(row: Mapping[str, object], column: str, asked: list[Message]) -> str:
    """An answer given as text, as one assistant message, or as the prompt's messages followed by one."""
    if isinstance(row.get(column), str):
        return text(row, column)
    turns = messages(row, column, or_one=True)
    if turns[-1]["role"] != "assistant":
        raise RowFault("wrong order of roles", f"`{column}` ends with `{turns[-1]['role']}`", "wanted `assistant`")
    if turns[:-1] not in ([], asked):
        raise RowFault(
            "prompts differ",
            f"the messages of `{column}` before its last one are not the prompt",
            "wanted one assistant message, or the prompt's messages and one assistant message",
        )
    return turns[-1]["content"]


def conversation(row: Mapping[str, object], column: str) -> tuple[list[Message], str]:
    """A column that holds a whole conversation, as its prompt and the assistant's last answer."""
    value = row.get(column)
    if isinstance(value, str) and TRANSCRIPT.match(value):
        turns = transcript(value, column)
    else:
        turns = messages(row, column, wanted="a list of messages")
    _check_order(turns, column)
    if turns[-1]["role"] != "assistant":
        raise RowFault(
            "wrong order of roles",
            f"`{column}` ends with `{turns[-1]['role']}`, not with an answer of the assistant",
            f"add the answer, or read `{column}` as prompts with `columns: {{prompt: {column}}}`",
        )
    return turns[:-1], turns[-1]["content"]


def transcript(value: str, column: str) -> list[Message]:
    """The turns of a conversation written as one text, each after `Human:` or `Assistant:` in a paragraph of its own.
    Of the space around a turn, only the one blank after the colon is taken away."""
    _, *parts = TRANSCRIPT.split(value)
    turns = []
    for number, (speaker, said) in enumerate(zip(parts[::2], parts[1::2], strict=True), start=1):
        content = _checked_text(said.removeprefix(" "), f"turn {number} of `{column}`")
        turns.append({"role": SPEAKERS[speaker], "content": content})
    return turns


def messages(
    row: Mapping[str, object], column: str, wanted: str = "text or a list of messages", *, or_one: bool = False
) -> list[Message]:
    """The messages of a column, as {role, content} or ShareGPT's {from, value}, each checked by itself. `or_one`: the
    column may also be a single message."""
    value = _present(row, column)
    if or_one and isinstance(value, dict):
        return [_message(value, f"`{column}`")]
    if not isinstance(value, list):
        raise RowFault("wrong type", f"`{column}` is {type_name(value)} ({show(value)}); wanted {wanted}")
    if not value:
        raise RowFault("empty", f"`{column}` has no messages")
    return [_message(item, f"message {number} of `{column}`") for number, item in enumerate(value, start=1)]


def checked_prompt(turns: list[Message], column: str) -> list[Message]:
    """`turns`, if they are a conversation that waits for the assistant."""
    if turns[-1]["role"] == "assistant" and len(turns) > 1:
        raise RowFault("wrong order of roles", f"`{column}` ends with `assistant`", "a prompt ends with `user`")
    _check_order(turns, column)
    if turns[-1]["role"] == "system":
        raise RowFault("wrong order of roles", f"`{column}` has only a system message", "a prompt ends with `user`")
    return turns


def part(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """An object inside a row."""
    value = row.get(column)
    if not isinstance(value, dict):
        raise RowFault("wrong type", f"`{escaped(column)}` is {type_name(value)} ({show(value)}); wanted an object")
    return value


def objects(row: Mapping[str, object], column: str) -> list[tuple[str, dict[str, Any]]]:
    """A list of objects, each with what messages call it."""
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise RowFault("wrong type", f"`{column}` is {type_name(value)} ({show(value)}); wanted a list of objects")
    for place, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            raise RowFault("wrong type", f"item {place} of `{column}` is {type_name(item)}; wanted an object")
    return [(f"item {place} of `{column}`", item) for place, item in enumerate(value, start=1)]


def with_system(turns: list[Message], system: str | None) -> list[Message]:
    """`turns` after a system message, if there is one to put there and they have none."""
    if system and turns and turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    return turns


def user(content: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": content}


def _present(row: Mapping[str, object], column: str, inside: str = "") -> object:
    if column not in row:
        raise RowFault("missing", f"{_named(column, inside)} is missing", did_you_mean(column, map(escaped, row)))
    if row[column] is None:
        raise RowFault("missing", f"{_named(column, inside)} is null")
    return row[column]


def _named(column: str, inside: str) -> str:
    return f"`{column}` of {inside}" if inside else f"`{column}`"


def _checked_text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RowFault("wrong type", f"{what} is {type_name(value)} ({show(value)}); wanted text")
    if not value.strip():
        raise RowFault("empty", f"{what} is only whitespace" if value else f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowFault(
            "not text",
            f"{what} has half a surrogate pair at character {error.start + 1}",
            "write the whole character",
        ) from None
    return str(value)  # a cell of a CSV file becomes plain text


def _message(item: object, what: str) -> Message:
    if not isinstance(item, dict):
        raise RowFault("wrong type", f"{what} is {type_name(item)}; wanted an object with `role` and `content`")
    sharegpt = "from" in item and "role" not in item
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    for key in (role_key, content_key):
        if key not in item:
            raise RowFault("missing", f"{what} has no `{key}`", did_you_mean(key, map(escaped, item)))
    if item.get("tool_calls"):
        raise RowFault("tool calls", f"{what} has `tool_calls`, which align does not train on", "write them as content")
    known: Mapping[str, str] = SHAREGPT_ROLES if sharegpt else dict(zip(ROLES, ROLES, strict=True))
    role = item[role_key]
    if not isinstance(role, str) or role not in known:
        raise RowFault("unknown role", f"{what} has the role {show(role)}", f"roles are {quoted(list(known))}")
    if item[content_key] is None:
        raise RowFault("missing", f"`{content_key}` of {what} is null")
    return {"role": known[role], "content": _checked_text(item[content_key], f"`{content_key}` of {what}")}


def _check_order(turns: Sequence[Message], column: str) -> None:
    before = None
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if before not in COMES_AFTER[role]:
            place = f"straight after `{before}`" if before else "at the start"
            wanted = [name for name, earlier in COMES_AFTER.items() if before in earlier]
            raise RowFault(
                "wrong order of roles",
                f"message {number} of `{column}` is `{role}` {place}",
                f"wanted {quoted(wanted)}",
            )
        before = role
