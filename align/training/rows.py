"""From canonical rows to the token rows that trainers take, with every row that is left out counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from align.context import Context
from align.data.files import RowProblem
from align.data.load import Dataset, load
from align.data.render import Renderer
from align.data.rows import Demonstration, Judgement, Preference
from align.data.spool import Spool
from align.errors import DataError, Problem
from align.recipe.data_settings import DataSettings, Role
from align.recipe.training_settings import TrainingSettings
from align.records import write_lines

Row = TypeVar("Row")
TokenRow = dict[str, Any]
"""Lists of token ids by name, and what is known of the row."""
MAX_SHOWN = 20
REJECTED = "rejected.jsonl"
"""In a stage's folder: every row that it leaves out, with the reason."""


def load_rows(settings: DataSettings, role: Role, context: Context) -> Dataset:
    """The rows of a stage. Rows left out are listed in the stage's rejected.jsonl with the reason."""
    dataset = load(settings, role)
    if dataset.report.skipped and context.is_main:
        write_lines(context.directory / REJECTED, map(rejected_line, dataset.report.skipped))
    return dataset


def rejected_line(problem: RowProblem) -> str:
    """A line of rejected.jsonl."""
    named = {"where": problem.where, "kind": problem.kind, "what": problem.what, "hint": problem.hint}
    return json.dumps(named, ensure_ascii=False) + "\n"


def demonstration_row(renderer: Renderer, row: Demonstration) -> TokenRow:
    """input_ids and labels; labels are -100 wherever the assistant is not speaking."""
    ids, mask = renderer.conversation(row.messages, row.source)
    return {
        "input_ids": ids,
        "labels": [token if counts else -100 for token, counts in zip(ids, mask, strict=True)],
    }


def preference_row(renderer: Renderer, row: Preference) -> TokenRow:
    """prompt_ids, chosen_ids and rejected_ids; both responses end with the end-of-turn token."""
    return {
        "prompt_ids": renderer.prompt(row.prompt, row.source),
        "chosen_ids": renderer.response(row.prompt, row.chosen, row.source),
        "rejected_ids": renderer.response(row.prompt, row.rejected, row.source),
    }


def judgement_row(renderer: Renderer, row: Judgement) -> TokenRow:
    """prompt_ids, response_ids and is_good; the response ends with the end-of-turn token."""
    return {
        "prompt_ids": renderer.prompt(row.prompt, row.source),
        "response_ids": renderer.response(row.prompt, row.response, row.source),
        "is_good": row.is_good,
    }


def token_rows(
    rows: Iterable[Row],
    convert: Callable[[Row], TokenRow],
    config: TrainingSettings,
    stage: str,
    too_long: Spool[RowProblem],
) -> Iterator[TokenRow]:
    """Converted rows that fit `max_length`; the others are added to `too_long`.

    Raises DataError at the end when a row does not fit and `on_long` is error, or when there were rows and none fits.
    """
    is_any_kept = False
    for row in rows:
        converted = convert(row)
        length = _longest(converted)
        if length <= config.max_length:
            is_any_kept = True
            yield converted
        else:
            what = f"{length} tokens, max_length is {config.max_length}"
            too_long.append(RowProblem(row.source, what, kind="over-long"))  # type: ignore[attr-defined]
    if too_long and config.on_long == "error":
        raise DataError(list(too_long[:MAX_SHOWN]))
    if too_long and not is_any_kept:
        what = f"none of {len(too_long)} rows fits max_length {config.max_length}"
        raise DataError(Problem(stage, what, f"raise it; {too_long[0]}"))


def _longest(row: TokenRow) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    responses = [row[name] for name in ("chosen_ids", "rejected_ids", "response_ids") if name in row]
    return len(row["prompt_ids"]) + max(map(len, responses))
