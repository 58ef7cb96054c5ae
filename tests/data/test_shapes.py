"""Every shape that any file may have, worked by hand; those of public data sets are in test_public.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.data.load import load
from align.data.rows import Demonstration, Document, Preference, Prompt, Row
from align.recipe.data_settings import DataSettings, Role


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


ASK = [turn("user", "Name a colour.")]
RED, SEVEN = turn("assistant", "Red."), turn("assistant", "Seven.")
TWO_TURNS = [turn("system", "Be brief."), *ASK, RED, turn("user", "Another?")]
BLUE, NINE = turn("assistant", "Blue."), turn("assistant", "Nine.")
HERE = "rows.jsonl:1"
PLAIN_PAIR = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Seven."}
PAIR = Preference(ASK, "Red.", "Seven.", HERE)
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
SUM = [turn("user", "Add.\n\n1 and 2")]

DEMONSTRATIONS = {
    "messages": ({"messages": [*ASK, RED]}, [*ASK, RED]),
    "several turns": ({"messages": [*TWO_TURNS, BLUE]}, [*TWO_TURNS, BLUE]),
    "tool": (
        {"messages": [*ASK, RED, turn("tool", "1"), turn("tool", "2"), BLUE]},
        [*ASK, RED, turn("tool", "1"), turn("tool", "2"), BLUE],
    ),
    "ShareGPT": (
        {"conversations": [said("system", "Be brief."), said("human", "Hi"), said("gpt", "Hello")]},
        [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello")],
    ),
    "keys of a message that are not used": (
        {"messages": [{**ASK[0], "name": "Ann", "tool_calls": None}, RED]},
        [*ASK, RED],
    ),
    "prompt and response": ({"prompt": "Name a colour.", "response": "Red."}, [*ASK, RED]),
    "prompt and completion": ({"prompt": "Name a colour.", "completion": "Red."}, [*ASK, RED]),
    "prompt and completion as messages": ({"prompt": TWO_TURNS, "completion": [BLUE]}, [*TWO_TURNS, BLUE]),
    "Alpaca": (ALPACA, [*SUM, turn("assistant", "3")]),
    "Alpaca with blank input": (
        {**ALPACA, "input": " "},
        [turn("user", "Add."), turn("assistant", "3")],
    ),
    "Alpaca with null input": ({**ALPACA, "input": None}, [turn("user", "Add."), turn("assistant", "3")]),
    "Alpaca with a system column": (
        {**ALPACA, "system": "Be brief."},
        [turn("system", "Be brief."), *SUM, turn("assistant", "3")],
    ),
    "Alpaca with preferences": (
        {**ALPACA, "chosen": "3", "rejected": "4"},
        [*SUM, turn("assistant", "3")],
    ),
    "spaces are kept": (
        {"prompt": " Q:\n", "response": " A \n"},
        [turn("user", " Q:\n"), turn("assistant", " A \n")],
    ),
}

PREFERENCES = {
    "texts": (PLAIN_PAIR, PAIR),
    "messages": ({"prompt": ASK, "chosen": [RED], "rejected": [SEVEN]}, PAIR),
    "prompt as text, answers as messages": ({**PLAIN_PAIR, "chosen": [RED], "rejected": [SEVEN]}, PAIR),
    "prompt again in the answers": ({**PLAIN_PAIR, "chosen": [*ASK, RED], "rejected": [*ASK, SEVEN]}, PAIR),
    "whole conversations": ({"chosen": [*ASK, RED], "rejected": [*ASK, SEVEN]}, PAIR),
    "whole conversations of several turns": (
        {"chosen": [*TWO_TURNS, BLUE], "rejected": [*TWO_TURNS, NINE]},
        Preference(TWO_TURNS, "Blue.", "Nine.", HERE),
    ),
    "Alpaca": (
        {**ALPACA, "chosen": "3", "rejected": "4"},
        Preference(SUM, "3", "4", HERE),
    ),
    "ShareGPT": (
        {
            "conversations": [said("human", "Name a colour.")],
            "chosen": "Red.",
            "rejected": [said("gpt", "Seven.")],
        },
        PAIR,
    ),
}

PROMPTS = {
    "prompt": ({"prompt": "Name a colour."}, ASK),
    "prompt as messages": ({"prompt": TWO_TURNS}, TWO_TURNS),
    "instruction": ({"instruction": "Add.", "input": "1 and 2"}, SUM),
    "of a preference": (PLAIN_PAIR, ASK),
    "of a tie": ({**PLAIN_PAIR, "rejected": "Red."}, ASK),
    "of whole conversations": ({"chosen": [*TWO_TURNS, BLUE], "rejected": [*TWO_TURNS, NINE]}, TWO_TURNS),
    "of a demonstration": ({"messages": [*TWO_TURNS, BLUE]}, TWO_TURNS),
    "of Alpaca with preferences": ({**ALPACA, "chosen": "3", "rejected": "4"}, SUM),
}

CORPUS = {
    "text": ({"text": "Once.\n"}, "Once.\n"),
    "text beside others": ({"text": "Once.", **ALPACA}, "Once."),
    "demonstration": ({"messages": [*ASK, RED]}, "Name a colour.\n\nRed."),
    "preference": (PLAIN_PAIR, "Name a colour.\n\nRed.\n\nSeven."),
    "prompt": ({"prompt": "Name a colour."}, "Name a colour."),
}


def read_one(row: object, role: Role, folder: Path, **settings: object) -> Row:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    [only] = load(DataSettings.model_validate({"path": str(path), **settings}), role).train
    return only


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("row", "messages"), DEMONSTRATIONS.values(), ids=DEMONSTRATIONS)
def test_demonstrations(row: dict, messages: list, tmp_path: Path) -> None:
    assert read_one(row, Role.DEMONSTRATIONS, tmp_path) == Demonstration(messages, HERE)


@pytest.mark.parametrize(("row", "preference"), PREFERENCES.values(), ids=PREFERENCES)
def test_preferences(row: dict, preference: Preference, tmp_path: Path) -> None:
    assert read_one(row, Role.PREFERENCES, tmp_path) == preference


@pytest.mark.parametrize(("row", "messages"), PROMPTS.values(), ids=PROMPTS)
def test_prompts(row: dict, messages: list, tmp_path: Path) -> None:
    assert read_one(row, Role.PROMPTS, tmp_path) == Prompt(messages, HERE)


@pytest.mark.parametrize(("row", "text"), CORPUS.values(), ids=CORPUS)
def test_corpus(row: dict, text: str, tmp_path: Path) -> None:
    assert read_one(row, Role.CORPUS, tmp_path) == Document(text, HERE)


def test_system_setting_fills_only_prompts_without_one(tmp_path: Path) -> None:
    asked = read_one({"prompt": ASK}, Role.PROMPTS, tmp_path, system="Be kind.")
    assert asked == Prompt([turn("system", "Be kind."), *ASK], HERE)
    assert read_one({"prompt": TWO_TURNS}, Role.PROMPTS, tmp_path, system="Be kind.") == Prompt(TWO_TURNS, HERE)
    own = read_one({"prompt": ASK, "system": "Be brief."}, Role.PROMPTS, tmp_path, system="Be kind.")
    assert own == Prompt([turn("system", "Be brief."), *ASK], HERE)


def test_mapping_names_private_columns(tmp_path: Path) -> None:
    row = {"question": "Name a colour.", "better": "Red.", "worse": "Seven."}
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert read_one(row, Role.PREFERENCES, tmp_path, columns=columns) == PAIR


def test_mapping_names_the_keys_and_roles_of_messages(tmp_path: Path) -> None:
    turns = [{"speaker": "client", "said": "Name a colour."}, {"speaker": "clerk", "said": "Red."}]
    columns = {"messages": "turns", "messages.role": "speaker", "messages.content": "said"}
    roles = {"client": "user", "clerk": "assistant"}
    row = read_one({"turns": turns}, Role.DEMONSTRATIONS, tmp_path, columns=columns, roles=roles)
    assert row == Demonstration([*ASK, RED], HERE)


def test_mapping_goes_into_objects(tmp_path: Path) -> None:
    row = {"task": {"text": {"en": "Name a colour."}}, "chosen": "Red.", "rejected": "Seven."}
    assert read_one(row, Role.PREFERENCES, tmp_path, columns={"prompt": "task.text.en"}) == PAIR


def test_mapping_gives_a_private_file_any_shape(tmp_path: Path) -> None:
    row = {"q": "Name a colour.", "a": "Seven.", "b": "Red.", "vote": 1}
    columns = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": "vote"}
    assert read_one(row, Role.PREFERENCES, tmp_path, columns=columns) == PAIR


def test_mapping_wins_over_a_column_that_has_the_name(tmp_path: Path) -> None:
    row = {**PLAIN_PAIR, "prompt": "p-17", "question": "Name a colour."}
    assert read_one(row, Role.PREFERENCES, tmp_path, columns={"prompt": "question"}) == PAIR


def test_mapping_decides_between_shapes(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "response": "Hello", "messages": [*ASK, RED]}
    by_messages = read_one(row, Role.DEMONSTRATIONS, tmp_path, columns={"messages": "messages"})
    by_response = read_one(row, Role.DEMONSTRATIONS, tmp_path, columns={"response": "response"})
    assert by_messages == Demonstration([*ASK, RED], HERE)
    assert by_response == Demonstration([turn("user", "Hi"), turn("assistant", "Hello")], HERE)


def test_conversations_without_an_answer_can_be_mapped_to_prompts(tmp_path: Path) -> None:
    assert read_one({"messages": ASK}, Role.PROMPTS, tmp_path, columns={"prompt": "messages"}) == Prompt(ASK, HERE)
