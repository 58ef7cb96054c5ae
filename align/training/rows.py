"""From canonical rows to the token rows that trainers take, with every row that is left out counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from align.context import Context
from align.data.load import Dataset, load
from align.data.render import Renderer
from align.data.rows import Demonstration, Judgement, Preference
from align.errors import DataError, Problem
from align.recipe.settings import DataSettings, Role, TrainingSettings
from align.records import write_text

Row = TypeVar("Row")
TokenRow = dict[str, Any]
"""Lists of token ids by name, and what is known of the row."""
MAX_SHOWN = 20


def load_rows(settings: DataSettings, role: Role, context: Context) -> Dataset:
    """The rows of a stage. Rows left out are listed in the stage's rejected.jsonl with the reason."""
    dataset = load(settings, role)
    lines = [
        json.dumps({"where": one.where, "kind": one.kind, "what": one.what, "hint": one.hint}, ensure_ascii=False)
        for one in dataset.report.skipped
    ]
    if lines:
        write_text(context.directory / "rejected.jsonl", "\n".join(lines) + "\n")
    return dataset


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
    rows: Sequence[Row], convert: Callable[[Row], TokenRow], config: TrainingSettings, stage: str
) -> tuple[list[TokenRow], int]:
    """Converted rows that fit `max_length`, and how many did not.

    Raises DataError when a row does not fit and `on_long` is error, or when none is left.
    """
    kept: list[TokenRow] = []
    problems: list[Problem] = []
    for row in rows:
        converted = convert(row)
        length = _longest(converted)
        if length <= config.max_length:
            kept.append(converted)
        else:
            problems.append(Problem(row.source, f"{length} tokens, max_length is {config.max_length}"))  # type: ignore[attr-defined]
    if problems and config.on_long == "error":
        raise DataError(problems[:MAX_SHOWN])
    if rows and not kept:
        raise DataError(
            Problem(
                stage,
                f"none of {len(rows)} rows fits max_length {config.max_length}",
                "raise it; " + str(problems[0]),
            )
        )
    return kept, len(problems)


def _longest(row: TokenRow) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    responses = [row[name] for name in ("chosen_ids", "rejected_ids", "response_ids") if name in row]
    return len(row["prompt_ids"]) + max(map(len, responses))
