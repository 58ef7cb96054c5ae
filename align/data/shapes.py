"""What a shape of rows is, and the shapes that any file may have; those of public data sets are in `public.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.faults import RowFault, show
from align.data.messages import (
    VERDICTS,
    answer,
    checked_prompt,
    conversation,
    messages,
    number,
    optional_text,
    prompt,
    text,
    user,
    verdict,
    with_system,
)
from align.data.readers import Cell, RawRow
from align.data.rows import Message
from align.data.split import prompt_key, text_key
from align.recipe.data_settings import Role


@dataclass(frozen=True)
class Parsed:
    """A row without its shape. A demonstration has one answer, a preference the better and the worse one, and a prompt
    none. A document has no prompt, and its text as its only answer."""

    prompt: list[Message]
    answers: list[str]
    scores: list[float] | None = None
    """One for each answer: then these say which is better, whatever the order."""
    places: list[int] | None = None
    """The row that each answer came from, where several rows were put together."""
    ratio: float | None = None
    """How many times the score of the worse answer the better one has, where the file says."""


Item = tuple[Any, ...]
"""What is kept of a row until its group is whole: plain values."""


@dataclass(frozen=True)
class Grouped:
    """How rows that belong together become one: answers to the same prompt, messages of the same tree.

    `read` checks a row and gives the key of its group and what is to be kept of it; `assemble` gets what was kept of a
    group, with the numbers of the rows.
    """

    read: Callable[[RawRow], tuple[str, Item]]
    assemble: Callable[[Sequence[tuple[int, Item]]], Iterable[tuple[int, Parsed | RowFault]]]


@dataclass(frozen=True)
class Shape:
    """`columns` must all be in the file, `optional` ones are read if they are; `kind` is what rows are."""

    kind: Role
    columns: tuple[str, ...]
    parse: Callable[[RawRow], Parsed] | Grouped
    optional: tuple[str, ...] = ("system",)
    telling: Mapping[str, Callable[[object], bool]] = field(default_factory=dict)
    """Values by which the shape is told from others with the same columns: one row must have them."""
    score: str = ""
    """Which of several scores it reads (`data.score`)."""
    data_set: str = ""
    """The public data set that has this shape; empty for shapes that any file may have."""
    pairs_per_prompt: int | None = None
    """At most so many, unless the setting says otherwise."""

    @property
    def name(self) -> str:
        return " + ".join(self.columns)


def document(row: RawRow) -> Parsed:
    return Parsed([], [text(row, "text")])


def whole_conversation(column: str) -> Callable[[RawRow], Parsed]:
    def parse(row: RawRow) -> Parsed:
        asked, last = conversation(row, column)
        return Parsed(asked, [last])

    return parse


def prompt_and(*columns: str, asked: str = "prompt") -> Callable[[RawRow], Parsed]:
    def parse(row: RawRow) -> Parsed:
        turns = prompt(row, asked)
        if isinstance(row.get(asked), str):
            turns = _in_context(turns, row, columns)
        return Parsed(turns, [answer(row, column, turns) for column in columns], _pair_scores(row, columns))

    return parse


def alpaca_and(*columns: str, extra: Sequence[str] = ("input",)) -> Callable[[RawRow], Parsed]:
    def parse(row: RawRow) -> Parsed:
        parts = [text(row, "instruction"), *(optional_text(row, column) for column in extra)]
        asked = [*_history(row), user("\n\n".join(filter(None, parts)))]
        return Parsed(asked, [answer(row, column, asked) for column in columns], _pair_scores(row, columns))

    return parse


def two_conversations(row: RawRow) -> Parsed:
    if all(isinstance(row.get(side), str) and not row[side].startswith(STARTS) for side in PAIR):  # type: ignore[union-attr]
        raise RowFault(
            "no prompt",
            "`chosen` and `rejected` are texts and there is no `prompt`: where the prompt ends and the "
            "answer begins cannot be told from their characters",
            "add a `prompt` column, name yours with `columns: {prompt: ...}`, or take what both texts begin with: "
            "`implicit_prompt: true`",
        )
    asked, chosen = conversation(row, "chosen")
    other, rejected = conversation(row, "rejected")
    if asked != other:
        differing = (number for number, (a, b) in enumerate(zip(asked, other, strict=False), start=1) if a != b)
        at = next(differing, min(len(asked), len(other)) + 1)
        raise RowFault(
            "prompts differ",
            f"`chosen` and `rejected` differ at message {at}, before their last one",
            "wanted two answers to the same prompt",
        )
    checked_prompt(asked, "chosen")
    return Parsed(asked, [chosen, rejected], _pair_scores(row, PAIR))


def scored(answered: Callable[[RawRow], Parsed], score: Callable[[RawRow], float]) -> Grouped:
    """Rows of one answer and its score, put together by their prompts."""

    def read(row: RawRow) -> tuple[str, Item]:
        parsed = answered(row)
        asked = with_system(parsed.prompt, optional_text(row, "system"))
        return prompt_key(asked), (asked, parsed.answers[0], score(row))

    def assemble(group: Sequence[tuple[int, Item]]) -> Iterable[tuple[int, Parsed | RowFault]]:
        places = [place for place, _ in group]
        prompts, answers, scores = zip(*(item for _, item in group), strict=True)
        yield places[0], Parsed(prompts[0], list(answers), list(scores), places)

    return Grouped(read, assemble)


def ranked(row: RawRow) -> Parsed:
    """One row with several answers and their scores."""
    asked = prompt(row, "prompt")
    lists = {name: row.get(name) for name in ("responses", "scores")}
    for name, value in lists.items():
        if not isinstance(value, list):
            raise RowFault("wrong type", f"`{name}` is {show(value)}; wanted a list")
    answers, scores = (dict(enumerate(value, start=1)) for value in lists.values())  # type: ignore[arg-type]
    if len(answers) != len(scores):
        raise RowFault("wrong type", f"there are {len(answers)} `responses` and {len(scores)} `scores`")
    return Parsed(
        asked,
        [text({f"responses[{place}]": value}, f"responses[{place}]") for place, value in answers.items()],
        [number({f"scores[{place}]": value}, f"scores[{place}]") for place, value in scores.items()],
    )


def judged(column: str) -> Callable[[RawRow], Parsed]:
    """One answer that was judged good (1) or bad (0)."""
    answered = prompt_and(column)

    def parse(row: RawRow) -> Parsed:
        parsed = answered(row)
        return Parsed(parsed.prompt, parsed.answers, [float(verdict(row, "label"))])

    return parse


def is_verdict(value: object) -> bool:
    """Whether a value of `label` is true or false, and not the name of a class."""
    return isinstance(value, bool | int | Cell) and str(value).lower() in VERDICTS


def is_number(value: object) -> bool:
    return isinstance(value, int | float | Cell) and not isinstance(value, bool)


def _in_context(turns: list[Message], row: RawRow, columns: Sequence[str]) -> list[Message]:
    """The conversation before the answers, where these hold it whole and the text of the prompt is one of its turns."""
    for column in columns:
        if isinstance(row.get(column), list):
            before = messages(row, column)[:-1]
            asked = text_key(turns[0]["content"])
            if any(turn["role"] == "user" and text_key(turn["content"]) == asked for turn in before):
                return checked_prompt(before, column)
    return turns


def _history(row: RawRow) -> list[Message]:
    """Earlier turns of an Alpaca row: pairs of a question and its answer."""
    turns: list[Message] = []
    pairs = row.get("history")
    for place, pair in enumerate(pairs if isinstance(pairs, list) else [], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault("wrong type", f"turn {place} of `history` is {show(pair)}; wanted a question and its answer")
        named = {f"history[{place}][{index}]": said for index, said in enumerate(pair, start=1)}
        asked, answered = (text(named, name) for name in named)
        turns += [user(asked), {"role": "assistant", "content": answered}]
    return turns


def _pair_scores(row: RawRow, columns: Sequence[str]) -> list[float] | None:
    """The scores of a chosen and a rejected answer, where the file has both. They may be equal, which says nothing, but
    not the wrong way round."""
    if tuple(columns) != PAIR:
        return None
    for names in PAIR_SCORES:
        if all(row.get(name) not in (None, "") for name in names):
            chosen, rejected = (number(row, name) for name in names)
            if chosen < rejected:
                what = f"`{names[0]}` ({chosen:g}) is below `{names[1]}` ({rejected:g})"
                raise RowFault("scores disagree", what, "the chosen answer must not have the lower score")
            return [chosen, rejected]
    return None


PAIR = ("chosen", "rejected")
STARTS = ("\n\nHuman:", "\n\nAssistant:")
PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
SCORED_PAIR = ("system", *(name for names in PAIR_SCORES for name in names))
ALPACA_OPTIONAL = ("input", "system", "history")
LABELLED = {"label": is_verdict}


def _label(row: RawRow) -> float:
    return float(verdict(row, "label"))


GENERAL = (
    Shape(Role.CORPUS, ("text",), document, optional=()),
    Shape(Role.DEMONSTRATIONS, ("messages",), whole_conversation("messages")),
    Shape(Role.DEMONSTRATIONS, ("conversations",), whole_conversation("conversations")),
    Shape(Role.DEMONSTRATIONS, ("prompt", "response"), prompt_and("response")),
    Shape(Role.DEMONSTRATIONS, ("prompt", "completion"), prompt_and("completion")),
    Shape(Role.DEMONSTRATIONS, ("instruction", "output"), alpaca_and("output"), ALPACA_OPTIONAL),
    Shape(Role.PREFERENCES, PAIR, two_conversations, SCORED_PAIR),
    Shape(Role.PREFERENCES, ("prompt", *PAIR), prompt_and(*PAIR), SCORED_PAIR),
    Shape(Role.PREFERENCES, ("instruction", *PAIR), alpaca_and(*PAIR), (*ALPACA_OPTIONAL, *SCORED_PAIR)),
    Shape(Role.PREFERENCES, ("conversations", *PAIR), prompt_and(*PAIR, asked="conversations"), SCORED_PAIR),
    Shape(
        Role.PREFERENCES,
        ("prompt", "response", "score"),
        scored(prompt_and("response"), lambda row: number(row, "score")),
        telling={"score": is_number},
    ),
    Shape(Role.PREFERENCES, ("prompt", "responses", "scores"), ranked),
    *(
        Shape(Role.PREFERENCES, ("prompt", column, "label"), scored(prompt_and(column), _label), telling=LABELLED)
        for column in ("completion", "response")
    ),
    *(
        Shape(Role.JUDGEMENTS, ("prompt", column, "label"), judged(column), telling=LABELLED)
        for column in ("completion", "response")
    ),
    Shape(Role.PROMPTS, ("prompt",), prompt_and()),
    Shape(Role.PROMPTS, ("instruction",), alpaca_and(), ALPACA_OPTIONAL),
)
