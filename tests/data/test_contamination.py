"""Training rows that evaluation sets have too are left out, named and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.data.load import content_hash, load
from align.errors import DataError
from align.recipe.data_settings import DataSettings, Role

WORDS = [f"word{number}" for number in range(20)]
MEASURED = [{"instruction": "What is 1 and 1?"}, {"instruction": " ".join(WORDS)}]
ROWS = {
    "the same prompt": ("What is 1 and 1?", True),
    "the same but for space": (" What is 1 and 1?\n", True),
    "13 words in a row": (f"Well, {' '.join(WORDS[3:16]).upper()}; and so on", True),
    "12 words in a row": (f"Well, {' '.join(WORDS[3:15])}; and so on", False),
    "13 words, not in a row": (f"{' '.join(WORDS[:7])} and {' '.join(WORDS[7:13])}", False),
    "part of a short prompt": ("What is 1 and 1? And 2?", False),
    "another": ("What is 2 and 2?", False),
}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("test.jsonl", MEASURED)


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_which_rows_are_left_out() -> None:
    """Equal prompts and runs of 13 words, whatever the case and the punctuation; nothing shorter."""
    write("train.jsonl", [{"prompt": prompt, "response": "Yes."} for prompt, _ in ROWS.values()])
    data = load(DataSettings(path="train.jsonl", held_out=0, decontaminate="test.jsonl"), Role.DEMONSTRATIONS)
    kept = [row.messages[0]["content"] for row in data.train]
    assert kept == [prompt for prompt, is_found in ROWS.values() if not is_found]
    assert [problem.kind for problem in data.report.skipped] == ["contaminated"] * 3
    assert [str(problem) for problem in data.report.skipped[1:]] == [
        "train.jsonl:2: its prompt is in an evaluation set, at test.jsonl:1",
        "train.jsonl:3: its prompt shares 13 words in a row with an evaluation set, at test.jsonl:2",
    ]


def test_the_prompt_counts_and_not_the_answer() -> None:
    """An answer that quotes an evaluation prompt is no leak of it; in a text without a prompt, all counts."""
    write("train.jsonl", [{"prompt": "Hi", "chosen": " ".join(WORDS), "rejected": "No."}])
    data = load(DataSettings(path="train.jsonl", decontaminate=["test.jsonl"]), Role.PREFERENCES)
    assert len(data.train) == 1
    write("train.jsonl", [{"text": " ".join(WORDS)}, {"text": "Hi"}])
    data = load(DataSettings(path="train.jsonl", decontaminate=["test.jsonl"]), Role.CORPUS)
    assert [row.text for row in data.train] == ["Hi"]


def test_an_evaluation_set_that_cannot_be_read_is_an_error() -> None:
    """Or nothing would be left out, silently."""
    write("train.jsonl", [{"prompt": "Hi"}])
    with pytest.raises(DataError, match=r"^tests\.jsonl: there is no such file \(did you mean `test\.jsonl`\?\)$"):
        load(DataSettings(path="train.jsonl", decontaminate="tests.jsonl"), Role.PROMPTS)


def test_the_content_hash_has_the_evaluation_sets() -> None:
    """Another evaluation set may leave other rows."""
    write("train.jsonl", [{"prompt": "Hi"}])
    hashes = {content_hash(DataSettings(path="train.jsonl", decontaminate=name)) for name in (None, "test.jsonl")}
    assert len(hashes) == 2
