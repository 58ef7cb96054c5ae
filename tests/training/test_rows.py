"""From canonical rows to token rows: what fits, what does not, and that every row left out is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.context import Context
from align.data.files import RowProblem
from align.data.render import Renderer
from align.data.rows import Preference
from align.data.spool import Spool
from align.errors import DataError
from align.job import Job
from align.recipe.data_settings import DataSettings, Role
from align.recipe.training_settings import TrainingSettings
from align.training.rows import load_rows, preference_row, token_rows
from tests.models.tiny import new_tokenizer

LENGTHS = [3, 9, 5, 12]


class Row:
    """A row known by its length only."""

    def __init__(self, number: int, length: int):
        self.source, self.length = f"rows.jsonl:{number}", length


ROWS = [Row(number, length) for number, length in enumerate(LENGTHS, start=1)]


def as_text(row: Row) -> dict[str, list[int]]:
    return {"input_ids": [0] * row.length}


def as_pair(row: Row) -> dict[str, list[int]]:
    return {"prompt_ids": [0] * 2, "chosen_ids": [0], "rejected_ids": [0] * (row.length - 2)}


@pytest.mark.parametrize("convert", [as_text, as_pair])
def test_long_rows_are_dropped_and_counted(convert):
    """Exactly the rows over max_length go, whole: none is cut, which would cost it its end of turn. A pair is as long
    as its prompt and its longer answer."""
    too_long: Spool[RowProblem] = Spool(RowProblem)
    kept = token_rows(ROWS, convert, TrainingSettings(max_length=5), "sft", too_long)
    assert list(kept) == [convert(ROWS[0]), convert(ROWS[2])]
    assert [one.where for one in too_long] == ["rows.jsonl:2", "rows.jsonl:4"]


def test_long_rows_are_an_error_where_asked():
    """on_long error: every one is named with its place and length."""
    with pytest.raises(DataError) as caught:
        list(token_rows(ROWS, as_text, TrainingSettings(max_length=5, on_long="error"), "sft", Spool(RowProblem)))
    assert [str(problem) for problem in caught.value.problems] == [
        "rows.jsonl:2: 9 tokens, max_length is 5",
        "rows.jsonl:4: 12 tokens, max_length is 5",
    ]


def test_no_row_left_is_an_error():
    """Dropping everything would train on nothing: the message says which setting to raise, with an example."""
    with pytest.raises(DataError, match=r"sft: none of 4 rows fits max_length 2 .*raise it; rows\.jsonl:1: 3 tokens"):
        list(token_rows(ROWS, as_text, TrainingSettings(max_length=2), "sft", Spool(RowProblem)))


def test_no_rows_are_no_error():
    """An empty held-out split is fine."""
    assert list(token_rows([], as_text, TrainingSettings(), "sft", Spool(RowProblem))) == []


def test_preference_row_shares_the_prompt_and_ends_both_answers():
    """Both answers follow the same prompt ids and end with the end-of-turn token: its probability is part of both."""
    renderer = Renderer(new_tokenizer())
    prompt = [{"role": "user", "content": "say hat"}]
    row = preference_row(renderer, Preference(prompt, "sure , hat", "no", "pairs.jsonl:1"))
    assert row["prompt_ids"] == renderer.prompt(prompt)
    for side, text in (("chosen_ids", "sure , hat"), ("rejected_ids", "no")):
        assert renderer.decode(row[side]) == text
        assert row[side][-1] == renderer.end_of_turn and renderer.end_of_turn not in row[side][:-1]


def test_rejected_rows_are_listed_with_their_reason(tmp_path):
    """rejected.jsonl names file, line and fault; without bad rows there is no such file."""
    job = Job("sft", "sft", 1, "0" * 64, 0, str(tmp_path), {}, {}, {}, [], {})
    good, bad = '{"prompt": "a", "response": "b"}\n', '{"prompt": "a", "response": 7}\n'
    (tmp_path / "good.jsonl").write_text(good * 3)
    (tmp_path / "bad.jsonl").write_text(good + bad)
    context = Context(job)
    load_rows(DataSettings(path=str(tmp_path / "good.jsonl"), held_out=0.0), Role.DEMONSTRATIONS, context)
    assert not (tmp_path / "rejected.jsonl").exists()
    settings = DataSettings(path=str(tmp_path / "bad.jsonl"), held_out=0.0, on_bad="skip")
    assert len(load_rows(settings, Role.DEMONSTRATIONS, context).train) == 1
    text = Path(tmp_path / "rejected.jsonl").read_text()
    assert text.count("\n") == 1 and "bad.jsonl:2" in text and "response" in text
