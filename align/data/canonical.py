"""What a parsed row becomes for a stage: canonical rows, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator

from align.data.faults import LeftOut, RowFault
from align.data.pairs import pairs
from align.data.rows import Demonstration, Document, Judgement, Preference, Prompt, Row
from align.data.shapes import PAIR, Parsed, Shape
from align.recipe.data_settings import PairRule, Role

ROW_TYPES: dict[Role, type[Row]] = {
    Role.CORPUS: Document,
    Role.DEMONSTRATIONS: Demonstration,
    Role.PREFERENCES: Preference,
    Role.JUDGEMENTS: Judgement,
    Role.PROMPTS: Prompt,
}
Made = Iterator[tuple[int, Row | RowFault]]
"""What was made, and the number of the row that it was made of."""


def canonical(parsed: Parsed, shape: Shape, role: Role, rule: PairRule, name: str, number: int) -> Made:
    """The rows for `role` of row `number` of the file called `name`."""
    source = f"{name}:{number}"
    asked, answers = parsed.prompt, parsed.answers
    if role is Role.PROMPTS:
        yield number, Prompt(asked, source)
    elif role is Role.CORPUS:
        yield number, Document("\n\n".join([*(turn["content"] for turn in asked), *answers]), source)
    elif role is Role.DEMONSTRATIONS:
        yield number, Demonstration([*asked, {"role": "assistant", "content": answers[0]}], source)
    elif shape.kind is Role.JUDGEMENTS:
        yield number, Judgement(asked, answers[0], parsed.scores == [1.0], source)
    else:
        for place, found in _compared(parsed, rule, is_pair=set(PAIR) <= set(shape.columns), number=number):
            if isinstance(found, RowFault):
                yield place, found
            elif role is Role.PREFERENCES:
                yield place, Preference(asked, *found, f"{name}:{place}")
            else:
                yield place, Judgement(asked, found[0], True, f"{name}:{place}")
                yield place, Judgement(asked, found[1], False, f"{name}:{place}")


def _compared(
    parsed: Parsed, rule: PairRule, *, is_pair: bool, number: int
) -> Iterator[tuple[int, tuple[str, str] | RowFault]]:
    """The better and the worse answer of every pair, and why some pairs are none. `is_pair`: the file names a
    chosen and a rejected answer."""
    if len(parsed.answers) < 2:
        yield number, LeftOut("one answer", "its prompt has fewer than two scored answers")
        return
    better, ties = pairs(parsed.scores, rule) if parsed.scores else ([(0, 1)], [])
    for a, b in ties:
        score = abs(parsed.scores[a]) if parsed.scores else 0
        yield number, LeftOut("equal scores", f"answers {a + 1} and {b + 1} have the same score ({score:g})")
    for a, b in better:
        place = parsed.places[a] if parsed.places else number
        if parsed.answers[a].strip() != parsed.answers[b].strip():
            yield place, (parsed.answers[a], parsed.answers[b])
        elif is_pair:
            what, hint = "`chosen` and `rejected` are the same", "a tie says nothing about preference: remove it"
            yield place, RowFault("tie", what, hint)
        else:
            yield place, LeftOut("same answers", f"answers {a + 1} and {b + 1} are the same text")
