"""What a model's tokenizer and chat template make of rows."""

from __future__ import annotations

from array import array
from math import ceil
from typing import Any

from align.data.checking.findings import Findings, Severity
from align.data.files import RowProblem
from align.data.render import Renderer
from align.data.rows import Demonstration, Document, Judgement, Preference, Prompt, Row
from align.errors import DataError, Problem

SHARES = {"median": 0.5, "p95": 0.95, "max": 1}
NO_LIMIT = 10**9
"""Tokenizers without a longest text give a number above this."""


class Tokens:
    """Renders every row as training does, and measures it. `max_length` None: what the tokenizer says, if it does."""

    def __init__(self, findings: Findings, renderer: Renderer, max_length: int | None):
        self._findings = findings
        self._renderer = renderer
        named = renderer.tokenizer.model_max_length
        self._max_length = max_length or (named if named < NO_LIMIT else None)
        self._lengths = array("l")
        self._answers = array("l")

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Renders a row."""
        try:
            asked, answers = self._rendered(row)
        except DataError as error:
            (problem,) = error.problems
            assert isinstance(problem, RowProblem)
            self._findings.row(problem.kind, position, problem.what)
            return
        bos = self._renderer.tokenizer.bos_token_id
        if bos is not None and asked[:2] == [bos, bos]:
            self._findings.row("double BOS", position, "it starts with two BOS tokens")
        longest = max(map(len, answers), default=0)
        if isinstance(row, Preference) and answers[0] == answers[1]:
            self._findings.row("alike answers", position, "its answers are the same tokens")
        self._lengths.append(len(asked) + longest)
        self._answers.extend(map(len, answers))
        if self._max_length is not None and not isinstance(row, Document):  # documents are packed into blocks
            self._check_length(position, len(asked), longest)

    def finish(self) -> dict[str, Any]:
        """Lengths in tokens, prompt and answer together and answers alone."""
        template = self._renderer.tokenizer.chat_template
        if self._renderer.is_chat and "{% generation" not in template.replace("{%-", "{%"):
            what = "it has no generation block, from which some trainers take the loss mask"
            problem = Problem("chat template", what, "align does not need it: its mask comes from where turns end")
            self._findings.note("no generation block", Severity.HINT, problem)
        return {
            "tokens": {
                "template": "chat" if self._renderer.is_chat else "plain",
                "max_length": self._max_length,
                "rows": _quantiles(self._lengths),
                "answers": _quantiles(self._answers),
            }
        }

    def _rendered(self, row: Row) -> tuple[list[int], list[list[int]]]:
        """Ids up to the last answer, and those of each possible last answer. Raises DataError."""
        render = self._renderer
        if isinstance(row, Document):
            return render.tokenizer(row.text)["input_ids"], []
        if isinstance(row, Prompt):
            return render.prompt(row.messages, row.source), []
        if isinstance(row, Demonstration):
            ids, mask = render.conversation(row.messages, row.source)
            answer = next((place for place, counts in enumerate(reversed(mask)) if not counts), len(mask))
            return ids[: len(ids) - answer], [ids[len(ids) - answer :]]
        texts = [row.response] if isinstance(row, Judgement) else [row.chosen, row.rejected]
        return render.prompt(row.prompt, row.source), [render.response(row.prompt, text, row.source) for text in texts]

    def _check_length(self, position: int, asked: int, answer: int) -> None:
        """align never cuts a row; what another trainer would lose is told."""
        assert self._max_length is not None
        over = asked + answer - self._max_length
        if over > 0:
            lost = "" if not answer else ", EOS with them" if over < answer else ", the whole answer with them"
            what = f"{asked + answer} tokens; cut to {self._max_length}, it would lose {over}{lost}"
            self._findings.row("over-long", position, what)


def _quantiles(values: array[int]) -> dict[str, int] | None:
    """What half of them, 95 % of them and all do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    return {name: ordered[ceil(share * len(ordered)) - 1] for name, share in SHARES.items()}
