"""Wrong data, one generated file each, and the message it gets; and data that looks wrong and is read.

The ids B01 to B104 are those of a list of bad inputs that every loader of training data meets; `BY_ID` says which case
stands for which, and `ELSEWHERE` where the others are tested, or why they are not.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from align.data.public import HELPSTEER_SCORES
from align.data.rows import Demonstration, Judgement, Preference, Row
from align.recipe.data_settings import Role

DEMONSTRATIONS = Role.DEMONSTRATIONS
BOMB = (b" " * (2**22 - 1) + b"\n") * 26
JUDGED = {"prompt": "Name a colour.", "completion": "Red.", "label": True}
RANKED = {"prompt": "Name a colour.", "responses": ["Red.", "Seven."], "scores": [2, 1]}
ASKED = "\n\nHuman: Is it?\n\nAssistant:"
GOOD = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Seven."}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


class Case(NamedTuple):
    """A file, how it is read, and a part of the message it must get; the whole message is in the docs."""

    file: str
    content: bytes
    expected: str
    role: Role = Role.PREFERENCES
    settings: Mapping[str, object] = MappingProxyType({})
    also: Sequence[str] = ()
    """Further files with the same content."""


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


def zst(content: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def scored_case(expected: str, **changes: object) -> Case:
    good = {"prompt": "Name a colour.", "response": "Red.", "score": 1}
    return Case("scored.jsonl", jsonl(good, {**good, **changes}), expected)


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
    "parquet cut": Case("pairs.parquet", parquet(prompt=["a"])[:-9], ": not a readable parquet file"),
    "parquet without rows": Case("rows.parquet", parquet(prompt=[]), ": the file has no rows"),
    "arrow": Case("pairs.arrow", b"not arrow", ": not a readable Arrow file"),
    "archive": Case("pairs.zip", b"PK", ": `.zip` is not a format align reads"),
    "packed parquet": Case("pairs.parquet.gz", gz(b"a"), ": `.parquet.gz` is not a format"),
    "gz cut": Case("pairs.jsonl.gz", gz(jsonl(GOOD))[:-9], ": the compressed data is damaged or cut"),
    "zst cut": Case("pairs.jsonl.zst", zst(jsonl(GOOD))[:-9], ": the compressed data is damaged or cut"),
    "no gz": Case("pairs.jsonl.gz", jsonl(GOOD), ": the name ends in `.gz`"),
    "gz without suffix": Case("pairs.jsonl", gz(jsonl(GOOD)), ": the file is compressed (gz)"),
    "bomb": Case("pairs.jsonl.zst", zst(BOMB), ": the file unpacks to over 104857600 bytes"),
    "long line": Case("pairs.jsonl", jsonl(GOOD) + b" " * 2**22 + b"{}\n", ":2: the line is over 4194304 bytes"),
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
    "garbage": Case("pairs.jsonl", jsonl(GOOD) + b"-- end --\n", ":2: not JSON at column 1"),
    "carriage returns": Case("pairs.jsonl", jsonl(GOOD, GOOD).replace(b"\n", b"\r"), ": its lines end in carriage"),
    "half a character": Case("pairs.jsonl", jsonl(GOOD) + b'{"a": "\xed\xa0\x80"}\n', ":2: byte 0xed at offset 76"),
    "control character": Case("pairs.jsonl", jsonl(GOOD) + b'{"a": "\0"}\n', ":2: not JSON at column 8"),
    "long number": Case("pairs.jsonl", jsonl(GOOD) + b'{"a": %d}\n' % 10**20, ":2: 100000000000000000000 does not"),
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
    "cut to a whole object": Case("pairs.jsonl", jsonl(GOOD, {}), ":2: `prompt` is missing"),
    "binary": Case(
        "pairs.parquet",
        parquet(prompt=[b"a"] * 2, chosen=["b"] * 2, rejected=["c"] * 2),
        ": in all 2 rows, `prompt` is binary",
    ),
    "scores disagree": Case(
        "pairs.jsonl",
        pair(score_chosen=1, score_rejected=2.5),
        ":2: `score_chosen` (1) is below `score_rejected` (2.5)",
    ),
    "pictures": Case("pairs.jsonl", pair(images=["a.png"]), ":2: `images` is not empty"),
    "score as text": scored_case(':2: `score` is text ("0.5")', score="0.5"),
    "score is null": scored_case(":2: `score` is null", score=None),
    "score is infinite": Case(
        "scored.parquet",
        parquet(prompt=["a"] * 2, response=["b"] * 2, score=[1.0, float("inf")]),
        ":2: `score` is inf",
    ),
    "label": Case(
        "judged.jsonl",
        jsonl(JUDGED, {**JUDGED, "label": 2}),
        ":2: `label` is a number (2); wanted true or false",
        Role.JUDGEMENTS,
    ),
    "which is better": Case(
        "safe.jsonl",
        jsonl(*[{"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": n} for n in (0, 2)]),
        ":2: `better_response_id` is 2",
    ),
    "scores of other answers": Case(
        "ranked.jsonl",
        jsonl(RANKED, {**RANKED, "scores": [1]}),
        ":2: there are 2 `responses` and 1 `scores`",
    ),
    "nothing to compare": Case(
        "scored.jsonl",
        jsonl(*[{"prompt": prompt, "response": "a", "score": 1} for prompt in "ab"]),
        ": in all 2 rows, its prompt has fewer than two",
    ),
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
    "empty turn": Case(
        "pairs.jsonl",
        jsonl(*[{"chosen": ASKED + end, "rejected": f"{ASKED} No."} for end in (" Yes.", "")]),
        ":2: turn 2 of `chosen` is empty",
    ),
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
    "no data in a folder": pairs_case("empty: there are no data files", GOOD, path="empty"),
    "two splits": Case(
        "data/train.jsonl",
        jsonl(GOOD),
        "data: the folder holds several splits: test, train",
        settings={"path": "data"},
        also=("data/test.jsonl",),
    ),
    "none of the files": pairs_case(".: no data file matches `test*`", GOOD, path=".", files="test*"),
    "files of a file": pairs_case(": `files` chooses among", GOOD, files="test*"),
    "model": Case(
        "model/config.json",
        b"{}",
        "model: this is the folder of a model",
        settings={"path": "model"},
        also=("model/model.safetensors",),
    ),
    "pattern": pairs_case("par*.jsonl: no file matches", GOOD, path="par*.jsonl"),
    "hub": pairs_case("org/pairs: a data set of the hub must be pinned", GOOD, path="org/pairs"),
    "no score": pairs_case(": `score` is help, which", GOOD, score="help"),
    "other score": Case(
        "helpsteer.jsonl",
        jsonl({"prompt": "a", "response": "b", **dict.fromkeys(HELPSTEER_SCORES, 1)}),
        ": `score` is helpful, which the file does not have (did you mean `helpfulness`?)",
        settings={"score": "helpful"},
    ),
    "judgements for sft": Case("judged.jsonl", jsonl(JUDGED), ": the file holds judgements", DEMONSTRATIONS),
    "part without rows": Case(
        "pairs.jsonl",
        jsonl(GOOD),
        "data.mixture.held: none of its 2 good rows is used",
        settings={
            "path": None,
            "mixture": {"all": {"path": "pairs.jsonl", "weight": 9}, "held": {"path": "held.jsonl", "weight": 1}},
        },
    ),
    "listed twice": pairs_case(": the file is listed twice", GOOD, path=["pairs.jsonl", "./pairs.jsonl"]),
    "leak": pairs_case(":1: its prompt is also held out, in held.jsonl:2", GOOD, held_out_path="held.jsonl"),
    "no paths": pairs_case("data: no row is left to train on", GOOD, path=[]),
}

CASES = {**FILES, **LINES, **ROWS, **MESSAGES, **COLUMNS}
HELD_OUT = jsonl({**GOOD, "prompt": "Another?"}, {**GOOD, "prompt": "  Name a colour. "})


class Accepted(NamedTuple):
    """A file that is read, and its rows."""

    file: str
    content: bytes
    rows: Sequence[Row]
    role: Role = Role.PREFERENCES
    settings: Mapping[str, object] = MappingProxyType({})


def red(*numbers: int, file: str = "pairs.jsonl", **changes: str) -> list[Row]:
    """The good row at some places of a file."""
    asked = changes.get("prompt", "Name a colour.")
    answers = changes.get("chosen", "Red."), changes.get("rejected", "Seven.")
    return [Preference([{"role": "user", "content": asked}], *answers, f"{file}:{number}") for number in numbers]


STRANGE = "\u2028\ufeff\u200b\u202e e\u0301 \U0001f469\u200d\U0001f4bb {{ 7 * 7 }} <|im_end|> \x1b[2J \u0000"
IMPLICIT = {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}]}
BOTS = [{"role": "bot", "content": "Hello"}, {"role": "person", "content": "Hi"}]

ACCEPTED = {
    "blank lines": Accepted("pairs.jsonl", b"\n" + jsonl(GOOD) + b" \n" + jsonl(GOOD), red(2, 4)),
    "no newline at the end": Accepted("pairs.jsonl", jsonl(GOOD, GOOD)[:-1], red(1, 2)),
    "CRLF": Accepted("pairs.jsonl", jsonl(GOOD, GOOD).replace(b"\n", b"\r\n"), red(1, 2)),
    "byte-order mark": Accepted("pairs.jsonl", b"\xef\xbb\xbf" + jsonl(GOOD), red(1)),
    "strange characters": Accepted("pairs.jsonl", pair(prompt=STRANGE), red(1) + red(2, prompt=STRANGE)),
    "two forms of a character": Accepted(
        "pairs.jsonl", jsonl({**GOOD, "chosen": "\u00e9", "rejected": "a"}), red(1, chosen="\u00e9", rejected="a")
    ),
    "gz": Accepted("pairs.jsonl.gz", gz(jsonl(GOOD, GOOD)), red(1, 2, file="pairs.jsonl.gz")),
    "gz of two members": Accepted(
        "pairs.jsonl.gz", gz(jsonl(GOOD)) + gz(jsonl(GOOD)), red(1, 2, file="pairs.jsonl.gz")
    ),
    "zst": Accepted(
        "pairs.csv.zst",
        zst(b"prompt,chosen,rejected\na,b,c\n"),
        red(2, file="pairs.csv.zst", prompt="a", chosen="b", rejected="c"),
    ),
    "dictionary column": Accepted(
        "pairs.parquet",
        parquet(prompt=pyarrow.array(["a"]).dictionary_encode(), chosen=["b"], rejected=["c"]),
        red(1, file="pairs.parquet", prompt="a", chosen="b", rejected="c"),
    ),
    "quoted newlines": Accepted(
        "pairs.csv",
        b'prompt,chosen,rejected\n"=a\n1",b,c\n',
        red(2, file="pairs.csv", prompt="=a\n1", chosen="b", rejected="c"),
    ),
    "further key": Accepted("pairs.jsonl", pair(chosenn="x"), red(1, 2)),
    "text and messages": Accepted("pairs.jsonl", pair(prompt=[{**USER, "content": "Name a colour."}]), red(1, 2)),
    "numbers of two kinds": Accepted(
        "scored.jsonl",
        jsonl(*[{"prompt": "a", "response": said, "score": score} for said, score in (("b", 1), ("c", 0.5))]),
        red(1, file="scored.jsonl", prompt="a", chosen="b", rejected="c"),
    ),
    "equal scores": Accepted("pairs.jsonl", pair(score_chosen=1, score_rejected=1.0), red(1)),
    "names of its own": Accepted(
        "pairs.jsonl",
        jsonl({"q": {"text": "a"}, "better": "b", "worse": "c"}),
        red(1, prompt="a", chosen="b", rejected="c"),
        settings={"columns": {"prompt": "q.text", "chosen": "better", "rejected": "worse"}},
    ),
    "implicit prompt": Accepted("pairs.jsonl", jsonl(IMPLICIT), red(1, prompt="Hi", chosen="Hello", rejected="No.")),
    "roles of its own": Accepted(
        "talk.jsonl",
        jsonl({"messages": BOTS[::-1]}),
        [Demonstration([USER, ANSWER], "talk.jsonl:1")],
        DEMONSTRATIONS,
        {"roles": {"bot": "assistant", "person": "user"}},
    ),
    "labels of both kinds": Accepted(
        "judged.jsonl",
        jsonl(JUDGED, {**JUDGED, "label": 0}),
        [
            Judgement([{**USER, "content": "Name a colour."}], "Red.", good, f"judged.jsonl:{n}")
            for n, good in ((1, True), (2, False))
        ],
        Role.JUDGEMENTS,
    ),
}

BY_ID = {
    "B01": ["missing file", "missing folder", "pattern", "none of the files"],
    "B02": ["empty"],
    "B03": ["blank"],
    "B04": ["blank lines"],
    "B05": ["no newline at the end"],
    "B06": ["cut"],
    "B07": ["cut to a whole object"],
    "B08": ["garbage"],
    "B09": ["CRLF"],
    "B10": ["carriage returns"],
    "B11": ["byte-order mark"],
    "B12": ["utf-16"],
    "B13": ["latin-1", "json latin-1"],
    "B14": ["latin-1"],
    "B15": ["half a character"],
    "B16": ["surrogate"],
    "B17": ["control character"],
    "B18": ["strange characters"],
    "B19": ["two forms of a character"],
    "B20": ["gz", "gz of two members", "zst"],
    "B21": ["gz cut", "zst cut"],
    "B22": ["no gz", "gz without suffix"],
    "B23": ["bomb"],
    "B24": ["long line"],
    "B26": ["array in jsonl"],
    "B27": ["pretty"],
    "B28": ["two objects"],
    "B29": ["no object"],
    "B30": ["syntax", "trailing comma"],
    "B31": ["key twice", "key twice in json"],
    "B32": ["deep"],
    "B33": ["long number"],
    "B34": ["nan"],
    "B36": ["parquet", "parquet cut", "parquet without rows", "parquet null", "binary", "dictionary column"],
    "B38": ["quoted newlines", "csv semicolons", "csv no name", "csv quote", "csv cells"],
    "B40": ["listed twice"],
    "B41": ["missing"],
    "B42": ["further key", "misspelt in a row", "misspelt"],
    "B43": ["null"],
    "B44": ["number"],
    "B45": ["text and messages"],
    "B46": ["number"],
    "B47": ["score as text"],
    "B48": ["numbers of two kinds"],
    "B49": ["score is null", "score is infinite"],
    "B50": ["label", "labels of both kinds"],
    "B51": ["unknown columns", "names of its own"],
    "B52": ["implicit prompt", "no prompt"],
    "B53": ["prompts differ", "answer of another prompt"],
    "B56": ["tie"],
    "B58": ["equal scores", "nothing to compare"],
    "B59": ["empty text", "same fault"],
    "B60": ["white space"],
    "B61": ["white space", "blank content"],
    "B78": ["scores disagree"],
    "B79": ["unknown role", "unknown ShareGPT role"],
    "B80": ["roles of its own"],
    "B81": ["same role twice", "assistant first", "late system"],
    "B82": ["no answer", "answer not by assistant"],
    "B83": ["prompt with answer"],
    "B84": ["null content"],
    "B85": ["no messages"],
    "B86": ["no role", "no content", "parts"],
    "B87": ["tool calls"],
    "B90": ["pictures"],
    "B92": ["leak"],
    "B99": ["archive"],
    "B100": ["escape codes"],
    "B101": ["strange characters"],
    "B103": ["model"],
}

ELSEWHERE = {
    "B25": "tests/data/test_memory.py",
    "B35": "tests/data/test_sources.py",
    "B37": "pyarrow reads types it does not know as what they are stored as, and runs nothing",
    "B39": "tests/data/test_sources.py",
    "B54": "align has no margins and no weights of rows",
    "B55": "align has no ids of rows",
    "B57": "but for space: tests/data/test_shapes.py; in Unicode form, as tokens: tests/data/test_checking.py",
    "B62": "tests/data/test_render.py: every answer ends with its end-of-turn token",
    "B63": "tests/data/test_checking.py",
    "B64": "tests/data/test_checking.py",
    "B65": "tests/training/test_rows.py",
    "B66": "tests/training/test_rows.py: rows are never cut",
    "B67": "tests/training/test_rows.py",
    "B68": "tests/data/test_render.py",
    "B69": "tests/data/test_render.py",
    "B70": "tests/data/test_render.py",
    "B71": "tests/data/test_render.py, tests/models/test_load.py",
    "B72": "tests/models/test_load.py",
    "B73": "tests/data/test_readers.py",
    "B74": "tests/data/test_checking.py",
    "B75": "tests/data/test_checking.py",
    "B76": "tests/data/test_checking.py",
    "B77": "tests/data/test_checking.py: of judgements; a pair has no position once it is chosen and rejected",
    "B88": "tests/data/test_checking.py",
    "B89": "tests/data/test_render.py",
    "B91": "tests/data/test_render.py",
    "B93": "tests/data/test_contamination.py",
    "B94": "tests/evaluation/test_policy.py",
    "B95": "the split is by prompt: tests/data/test_split.py",
    "B96": "tests/evaluation/test_policy.py, tests/stages/test_chain.py",
    "B97": "tests/data/test_split.py",
    "B98": "tests/data/test_checking.py",
    "B102": "no pattern of align's backtracks, and none is the user's",
    "B104": "tests/data/test_checking.py",
}
