"""One row for the terminal: its canonical form, its tokens and which of them train."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from align.data.render import Renderer
from align.data.rows import Demonstration, Document, Judgement, Message, Prompt, Row

TRAINED, SPECIAL = "green", "reverse"
SHOWN = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories of what a terminal does not show, or obeys."""


def visible(text: str) -> str:
    """The text without anything that a terminal would obey or hide: an escape is `\\x1b`, a newline goes on as one."""
    return "".join(
        letter if letter == "\n" or unicodedata.category(letter) not in HIDDEN else ascii(letter)[1:-1]
        for letter in text
    )


def render_row(row: Row, renderer: Renderer | None) -> RenderableType:
    """The canonical row; with a renderer, below it the ids that a stage gets."""
    parts = [Text(f"{visible(row.source)}  {type(row).__name__.lower()}", style="bold"), *_canonical(row)]
    for name, ids, mask in _token_rows(row, renderer) if renderer else ():
        parts += [Text(""), _headline(name, ids, mask), _tokens(renderer, ids, mask)]  # type: ignore[arg-type]
    return Group(*parts, Text(""))


def _canonical(row: Row) -> Iterator[Text]:
    if isinstance(row, Document):
        yield _said("text", row.text)
        return
    for turn in row.messages if isinstance(row, Demonstration | Prompt) else row.prompt:
        yield _said(turn["role"], turn["content"])
    if isinstance(row, Judgement):
        yield _said("good" if row.is_good else "bad", row.response)
    elif not isinstance(row, Demonstration | Prompt):
        yield _said("chosen", row.chosen)
        yield _said("rejected", row.rejected)


def _said(name: str, text: str) -> Text:
    return Text.assemble((f"{name}: ", "cyan"), visible(text))


def _token_rows(row: Row, renderer: Renderer) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Name, ids and loss mask of each sequence that is made of the row. Raises DataError."""
    if isinstance(row, Document):
        ids = renderer.tokenizer(row.text)["input_ids"]
        yield "text", ids, [True] * len(ids)
    elif isinstance(row, Prompt):
        ids = renderer.prompt(row.messages, row.source)
        yield "prompt", ids, [False] * len(ids)
    elif isinstance(row, Demonstration):
        yield "conversation", *renderer.conversation(row.messages, row.source)
    elif isinstance(row, Judgement):
        yield "response", *_answered(renderer, row.prompt, row.response, row.source)
    else:
        for name, text in (("chosen", row.chosen), ("rejected", row.rejected)):
            yield name, *_answered(renderer, row.prompt, text, row.source)


def _answered(renderer: Renderer, prompt: Sequence[Message], text: str, source: str) -> tuple[list[int], list[bool]]:
    asked = renderer.prompt(prompt, source)
    answer = renderer.response(prompt, text, source)
    return asked + answer, [False] * len(asked) + [True] * len(answer)


def _headline(name: str, ids: Sequence[int], mask: Sequence[bool]) -> Text:
    counted = f"{len(ids)} tokens, {sum(mask)} of them count in the loss "
    return Text.assemble((name, "bold"), f": {counted}(", ("these", TRAINED), "), ", ("special", SPECIAL))


def _tokens(renderer: Renderer, ids: Sequence[int], mask: Sequence[bool]) -> Text:
    """The text token by token: trained ones coloured, special ones reversed, newlines marked."""
    special = set(renderer.tokenizer.all_special_ids)
    text = Text()
    for run, counts in _characters(renderer, ids, mask):
        style = " ".join(name for name, holds in ((TRAINED, counts), (SPECIAL, run[0] in special)) if holds)
        text.append(visible(renderer.tokenizer.decode(run)).replace("\n", f"{SHOWN}\n"), style=style or "dim")
    return text


def _characters(renderer: Renderer, ids: Sequence[int], mask: Sequence[bool]) -> Iterator[tuple[list[int], bool]]:
    """Ids in runs that end where a character does (one may take several tokens), and whether they count."""
    run: list[int] = []
    for place, token in enumerate(ids):
        run.append(token)
        is_end = place + 1 == len(ids) or mask[place + 1] != mask[place]
        if is_end or not renderer.tokenizer.decode(run).endswith("\N{REPLACEMENT CHARACTER}"):
            yield run, mask[place]
            run = []
