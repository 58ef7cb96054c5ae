"""The shapes of rows that files come in, and how each becomes a prompt and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from align.data.faults import RowFault
from align.data.messages import answer, checked_prompt, conversation, optional_text, prompt, text, user
from align.data.readers import RawRow
from align.data.rows import Message
from align.recipe.settings import Role


@dataclass(frozen=True)
class Parsed:
    """A row without its shape. A demonstration has one answer, a preference the chosen and the rejected one,
    and a prompt none. A document has no prompt, and its text as its only answer."""

    prompt: list[Message]
    answers: list[str]


@dataclass(frozen=True)
class Shape:
    """`columns` must all be in the file, `optional` ones are read if they are; `kind` is what rows are."""

    kind: Role
    columns: tuple[str, ...]
    parse: Callable[[RawRow], Parsed]
    optional: tuple[str, ...] = ("system",)

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
        return Parsed(turns, [answer(row, column, turns) for column in columns])

    return parse


def alpaca_and(*columns: str) -> Callable[[RawRow], Parsed]:
    def parse(row: RawRow) -> Parsed:
        instruction, extra = text(row, "instruction"), optional_text(row, "input")
        asked = [user(f"{instruction}\n\n{extra}" if extra else instruction)]
        return Parsed(asked, [text(row, column) for column in columns])

    return parse


def two_conversations(row: RawRow) -> Parsed:
    if isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        raise RowFault(
            "no prompt",
            "`chosen` and `rejected` are texts and there is no `prompt`: where the prompt ends and the "
            "answer begins cannot be told from their characters",
            "add a `prompt` column, or name yours with `columns: {prompt: ...}`",
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
    return Parsed(asked, [chosen, rejected])


ALPACA_OPTIONAL = ("input", "system")

SHAPES = (
    Shape(Role.CORPUS, ("text",), document, optional=()),
    Shape(Role.DEMONSTRATIONS, ("messages",), whole_conversation("messages")),
    Shape(Role.DEMONSTRATIONS, ("conversations",), whole_conversation("conversations")),
    Shape(Role.DEMONSTRATIONS, ("prompt", "response"), prompt_and("response")),
    Shape(Role.DEMONSTRATIONS, ("prompt", "completion"), prompt_and("completion")),
    Shape(Role.DEMONSTRATIONS, ("instruction", "output"), alpaca_and("output"), ALPACA_OPTIONAL),
    Shape(Role.PREFERENCES, ("chosen", "rejected"), two_conversations),
    Shape(Role.PREFERENCES, ("prompt", "chosen", "rejected"), prompt_and("chosen", "rejected")),
    Shape(
        Role.PREFERENCES,
        ("instruction", "chosen", "rejected"),
        alpaca_and("chosen", "rejected"),
        ALPACA_OPTIONAL,
    ),
    Shape(
        Role.PREFERENCES,
        ("conversations", "chosen", "rejected"),
        prompt_and("chosen", "rejected", asked="conversations"),
    ),
    Shape(Role.PROMPTS, ("prompt",), prompt_and()),
    Shape(Role.PROMPTS, ("instruction",), alpaca_and(), ALPACA_OPTIONAL),
)

# Kinds of rows that each role can be had from; the first kind that a file holds is taken.
SERVED_BY: Mapping[Role, tuple[Role, ...]] = {
    Role.CORPUS: (Role.CORPUS, Role.DEMONSTRATIONS, Role.PREFERENCES, Role.PROMPTS),
    Role.DEMONSTRATIONS: (Role.DEMONSTRATIONS,),
    Role.PREFERENCES: (Role.PREFERENCES,),
    Role.PROMPTS: (Role.PREFERENCES, Role.DEMONSTRATIONS, Role.PROMPTS),
}
