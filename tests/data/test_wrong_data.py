"""Every message that wrong data gets: one generated file each, and the same text in docs/data.md."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

from align.data.load import load
from align.errors import DataError
from align.recipe.settings import DataSettings, Role

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
DEMONSTRATIONS = Role.DEMONSTRATIONS
GOOD = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Seven."}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


class Case(NamedTuple):
    """A file, how it is read, and a part of the message it must get; the whole message is in the docs."""

    file: str
    content: bytes
    expected: str
    role: Role = Role.PREFERENCES
    settings: Mapping[str, object] = MappingProxyType({})


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def pair(**changes: object) -> bytes:
    """A good row, then one that is bad: problems are about row 2."""
    return jsonl(GOOD, {**GOOD, **changes})


def without(column: str, **changes: object) -> bytes:
    return jsonl(GOOD, {**{name: value for name, value in GOOD.items() if name != column}, **changes})


def talk(*turns: object) -> bytes:
    return jsonl({"messages": [USER, ANSWER]}, {"messages": turns})


def pairs_case(expected: str, row: dict, **settings: object) -> Case:
    return Case("pairs.jsonl", jsonl(row), expected, settings=settings)


def talk_case(expected: str, *turns: object) -> Case:
    return Case("talk.jsonl", talk(*turns), expected, DEMONSTRATIONS)


def prompt_case(expected: str, *turns: object) -> Case:
    return Case("prompts.jsonl", jsonl({"prompt": turns}), expected, Role.PROMPTS)


def parquet(**columns: list) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


FILES = {
    "empty": Case("pairs.jsonl", b"", ": the file is empty"),
    "blank": Case("pairs.jsonl", b"\n \n", ": the file has only blank lines"),
    "suffix": Case("pairs.txt", b"x", ": `.txt` is not a format align reads"),
    "no rows": Case("pairs.json", b"[]", ": the file has no rows"),
    "utf-16": Case("pairs.jsonl", '{"a": 1}'.encode("utf-16"), ": the file is UTF-16 or UTF-32"),
    "array in jsonl": Case("pairs.jsonl", b'[{"prompt": "a"}]', ": the file starts with `[`"),
    "pretty": Case("pairs.jsonl", b'{\n "a": 1\n}\n', ": objects are spread over several lines"),
    "jsonl in json": Case("pairs.json", jsonl(GOOD, GOOD), ": the file holds one object after another"),
    "object in json": Case("pairs.json", b'{"data": []}', ": the file is an object at its top level"),
    "no json": Case("pairs.json", b"prompt", ": not JSON at line 1, column 1"),
    "json syntax": Case("pairs.json", b'[{"a": 1},\n {"a": }]', ":2: not JSON at line 2, column 8"),
    "trailing comma": Case("pairs.json", b'[{"a": 1},\n]', ":1: a comma after the last row"),
    "open array": Case("pairs.json", b'[{"a": 1}', ":1: the array is not closed"),
    "no comma": Case("pairs.json", b'[{"a": 1} {"a": 2}]', ":1: no comma before line 1, column 11"),
    "after array": Case("pairs.json", b"[{}]\n[]", ": there is more after the end of the array"),
    "json latin-1": Case("pairs.json", b'[\n{"a": "\xe9"}]', ": byte 0xe9 at offset 9 (line 2) is not UTF-8"),
    "csv semicolons": Case("pairs.csv", b"prompt;chosen\na;b\n", ":1: the header has semicolons"),
    "csv no name": Case("pairs.csv", b"prompt,\na,b\n", ":1: the header has a column without a name"),
    "csv twice": Case("pairs.csv", b"prompt,prompt\na,b\n", ": two columns have the name `prompt`"),
    "csv quote": Case("pairs.csv", b'prompt,chosen\na,"b\n', ":2: not CSV: unexpected end of data"),
    "parquet": Case("pairs.parquet", b"not parquet", ": not a readable parquet file"),
}

LINES = {
    "cut": Case("pairs.jsonl", jsonl(GOOD) + b'{"prompt": "a', ":2: the last line is not complete JSON"),
    "syntax": Case("pairs.jsonl", jsonl(GOOD) + b"{'a': 1}\n", ":2: not JSON at column 2"),
    "deep": Case("pairs.jsonl", jsonl(GOOD) + b"[" * 100_000 + b"\n", ":2: not JSON at column 1"),
    "two objects": Case("pairs.jsonl", jsonl(GOOD) + b"{} {}\n", ":2: the line goes on"),
    "no object": Case("pairs.jsonl", jsonl(GOOD, "Hi"), ":2: the row is text"),
    "latin-1": Case("pairs.jsonl", jsonl(GOOD) + b'{"a": "\xe9"}\n', ":2: byte 0xe9 at offset 76 of the file"),
    "key twice": Case("pairs.jsonl", jsonl(GOOD) + b'{"a": 1, "a": 2}\n', ":2: the key `a` is given twice"),
    "key twice in json": Case("pairs.json", b'[{"a": 1, "a": 2}]', ":1: the key `a` is given twice"),
    "nan": Case("pairs.jsonl", jsonl(GOOD) + b'{"a": NaN}\n', ":2: NaN is not a JSON value"),
    "csv cells": Case("pairs.csv", b"prompt,chosen,rejected\na,b,c\nd,e\n", ":3: 2 cells, but the header has 3"),
}

ROWS = {
    "missing": Case("pairs.jsonl", without("rejected"), ":2: `rejected` is missing"),
    "misspelt in a row": Case("pairs.jsonl", without("chosen", chosenn="b"), ":2: `chosen` is missing"),
    "null": Case("pairs.jsonl", pair(chosen=None), ":2: `chosen` is null"),
    "parquet null": Case(
        "pairs.parquet",
        parquet(prompt=["a", "b"], chosen=["c", None], rejected=["d", "e"]),
        ":2: `chosen` is null",
    ),
    "number": Case("pairs.jsonl", pair(chosen=3), ":2: `chosen` is a number (3)"),
    "system is no text": Case("pairs.jsonl", pair(system=True), ":2: `system` is true or false (true)"),
    "empty text": Case("pairs.jsonl", pair(rejected=""), ":2: `rejected` is empty"),
    "white space": Case("pairs.jsonl", pair(prompt=" \n"), ":2: `prompt` is only whitespace"),
    "surrogate": Case("pairs.jsonl", pair(prompt="a\ud800"), ":2: `prompt` has half a surrogate pair"),
    "tie": Case("pairs.jsonl", pair(rejected="Red. "), ":2: `chosen` and `rejected` are the same"),
    "same fault": Case("pairs.jsonl", jsonl(*[{**GOOD, "chosen": ""}] * 3), ": in all 3 rows, `chosen` is empty"),
    "no prompt": Case(
        "pairs.jsonl",
        jsonl(*[{"chosen": "Hi: a", "rejected": "Hi: b"}] * 2),
        ": in all 2 rows, `chosen` and `rejected` are texts",
    ),
    "prompts differ": Case(
        "pairs.jsonl",
        jsonl({"chosen": [USER, ANSWER], "rejected": [{"role": "user", "content": "Hey"}, ANSWER]}),
        ":1: `chosen` and `rejected` differ at message 1",
    ),
    "answer of another prompt": Case(
        "pairs.jsonl",
        pair(chosen=[USER, ANSWER]),
        ":2: the messages of `chosen` before its last one",
    ),
    "answer not by assistant": Case("pairs.jsonl", pair(chosen=[USER]), ":2: `chosen` ends with `user`"),
}

BLANK, NOTHING, PARTS = ({**ANSWER, "content": content} for content in (" ", None, []))
SYSTEM, BOT, CLEAR = ({**USER, "role": role} for role in ("system", "bot", "\x1b[2J"))
CALL = {**ANSWER, "tool_calls": [{}]}

MESSAGES = {
    "text for messages": Case("talk.csv", b"messages\nHi\n", ":2: `messages` is text", DEMONSTRATIONS),
    "no messages": talk_case(":2: `messages` has no messages"),
    "message is text": talk_case(":2: message 1 of `messages` is text", "Hi"),
    "no content": talk_case(":2: message 1 of `messages` has no `content`", {"role": "user"}),
    "no role": talk_case(":2: message 1 of `messages` has no `role`", {"rol": "user", "content": "a"}),
    "null content": talk_case(":2: `content` of message 2 of `messages` is null", USER, NOTHING),
    "parts": talk_case(":2: `content` of message 2 of `messages` is a list", USER, PARTS),
    "blank content": talk_case(":2: `content` of message 2 of `messages` is only whitespace", USER, BLANK),
    "unknown role": talk_case(':2: message 1 of `messages` has the role "bot"', BOT),
    "escape codes": talk_case(':2: message 1 of `messages` has the role "\\u001b[2J"', CLEAR),
    "unknown ShareGPT role": Case(
        "talk.jsonl",
        jsonl({"conversations": [{"from": "bing", "value": "Hi"}]}),
        ':1: message 1 of `conversations` has the role "bing"',
        DEMONSTRATIONS,
    ),
    "tool calls": talk_case(":2: message 2 of `messages` has `tool_calls`", USER, CALL),
    "same role twice": talk_case(":2: message 2 of `messages` is `user` straight after", USER, USER, ANSWER),
    "assistant first": talk_case(":2: message 1 of `messages` is `assistant` at the start", ANSWER, USER),
    "late system": talk_case(":2: message 2 of `messages` is `system` straight after", USER, SYSTEM),
    "no answer": talk_case(":2: `messages` ends with `user`", USER),
    "prompt with answer": prompt_case(":1: `prompt` ends with `assistant`", USER, ANSWER),
    "only system": prompt_case(":1: `prompt` has only a system message", SYSTEM),
}

TWO_WAYS = {"prompt": "a", "response": "b", "messages": [USER, ANSWER]}

COLUMNS = {
    "preferences for sft": Case(
        "pairs.jsonl", jsonl(GOOD), ": the file holds preferences (prompt + chosen", DEMONSTRATIONS
    ),
    "demonstrations for dpo": Case("talk.jsonl", talk(), ": the file holds demonstrations (messages), not"),
    "text for ppo": Case("book.jsonl", jsonl({"text": "a"}), ": the file holds text (text)", Role.PROMPTS),
    "misspelt": pairs_case(": there is no column `chosen`, but", {"prompt": "a", "chosenn": "b", "rejected": "c"}),
    "unknown columns": pairs_case(": the columns `a`, `b` are not", {"a": 1, "b": 2}),
    "ambiguous": Case("talk.jsonl", jsonl(TWO_WAYS), " several ways: messages or prompt", DEMONSTRATIONS),
    "unknown name": pairs_case(": `promt` is not a name", GOOD, columns={"promt": "prompt"}),
    "no such column": pairs_case(": there is no column `promt`, which", GOOD, columns={"prompt": "promt"}),
    "missing file": pairs_case("pair.jsonl: there is no such file", GOOD, path="pair.jsonl"),
    "missing folder": pairs_case("no/pairs.jsonl: there is no such file", GOOD, path="no/pairs.jsonl"),
    "folder": pairs_case(".: this is a folder", GOOD, path="."),
    "listed twice": pairs_case(": the file is listed twice", GOOD, path=["pairs.jsonl", "./pairs.jsonl"]),
    "leak": pairs_case(":1: its prompt is also held out, in held.jsonl:2", GOOD, held_out_path="held.jsonl"),
    "no paths": pairs_case("data: no row is left to train on", GOOD, path=[]),
}

CASES = {**FILES, **LINES, **ROWS, **MESSAGES, **COLUMNS}
HELD_OUT = jsonl({**GOOD, "prompt": "Another?"}, {**GOOD, "prompt": "  Name a colour. "})


def first_message(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path(case.file).write_bytes(case.content)
    Path("held.jsonl").write_bytes(HELD_OUT)
    with pytest.raises(DataError) as error:
        load(DataSettings(**{"path": case.file, **case.settings}), case.role)
    return str(error.value.problems[0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_message(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says where and what, in one line of printable text, and the docs have it word for word."""
    message = first_message(case, tmp_path / "data", monkeypatch)
    assert case.expected in message
    assert message.isprintable()
    assert message in shown_in_docs()


def test_docs_show_no_other_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {first_message(case, tmp_path / str(index), monkeypatch) for index, case in enumerate(CASES.values())}
    assert shown_in_docs() == made


def shown_in_docs() -> set[str]:
    section = DOCS.read_text(encoding="utf-8").split("## Wrong data and the messages it gets")[1]
    blocks = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    return {line for block in blocks for line in block.splitlines()}
