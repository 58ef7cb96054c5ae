"""`align data`: looks at data before anything is trained on it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from align.cli.app import app
from align.errors import ConfigError, DataError, Problem
from align.recipe.data_settings import ReadSettings, Role
from align.recipe.load import read_settings

if TYPE_CHECKING:
    from align.data.checking.check import Checked, Order
    from align.data.render import Renderer

data = typer.Typer(name="data", help="Look at data before training: check it, show a row, describe it.")
app.add_typer(data)

RoleOption = Annotated[
    Role | None, typer.Option(help="What a stage would read it as. Default: what it holds.", show_default=False)
]
TokenizerOption = Annotated[
    Path | None, typer.Option(help="Folder of the model whose tokenizer renders the rows.", show_default=False)
]


@data.command()
def check(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH... [KEY=VALUE ...]",
            help="Files or folders, and settings that say how they are read (`columns.prompt=question`).",
            show_default=False,
        ),
    ],
    role: RoleOption = None,
    tokenizer: TokenizerOption = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a row may have. Default: what the tokenizer says.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Evaluation set whose prompts may not be in the data; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON document.")] = False,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Write a clean copy, without the rows that are wrong.")
    ] = None,
) -> None:
    """Find what is wrong with data, and what looks odd.

    Exit code 3: there are errors (with --fix: that leaving rows out does not mend).
    """
    from align.cli.findings import print_checked
    from align.data.checking.check import Order
    from align.data.checking.check import check as check_rows
    from align.data.checking.clean import refuse_target
    from align.data.progress import progress

    if fix is not None:
        refuse_target(fix)
    if max_length is not None and tokenizer is None:
        raise ConfigError(Problem("--max-length", "counts tokens, so it needs a tokenizer", "add --tokenizer FOLDER"))
    paths, settings = _read(arguments)
    role = role or _guessed(paths, settings)
    order = Order(paths, role, _renderer(tokenizer), max_length, settings, tuple(against or ()))
    with progress("checking") as (advance, expect):
        checked = check_rows(order, advance, expect)
    fixed = _fixed(order, checked, fix) if fix is not None else None
    if as_json:
        print(json.dumps(checked.as_json() | {"fixed": fixed}, indent=2, ensure_ascii=False))
    else:
        print_checked(checked, fixed, shlex.join(arguments), has_tokenizer=tokenizer is not None)
    if checked.incurable or (checked.has_errors and fixed is None):
        raise typer.Exit(DataError.exit_code)


@data.command()
def show(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH [KEY=VALUE ...]", help="A file, and settings that say how it is read.", show_default=False
        ),
    ],
    row: Annotated[
        int, typer.Option(min=1, help="Its line (.jsonl, .csv) or row, as messages name it.", show_default=False)
    ],
    role: RoleOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Show a row as a stage reads it, and with a tokenizer the tokens that it trains on."""
    from align.cli.row import render_row
    from align.data.checking.one import rows_at

    paths, settings = _read(arguments)
    if len(paths) > 1:
        raise ConfigError(Problem(paths[1], "is a second file", "name one"))
    console = Console(highlight=False)
    renderer = _renderer(tokenizer)
    for found in rows_at(paths[0], row, role or _guessed(paths, settings), settings):
        console.print(render_row(found, renderer), soft_wrap=False)


@data.command()
def card(
    name: Annotated[str, typer.Argument(help="Name of the card: CARDS/NAME.md.", show_default=False)],
    init: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a card for this data file: what can be measured.")
    ] = None,
    check_: Annotated[bool, typer.Option("--check", help="Compare the card with its file.")] = False,
    role: RoleOption = None,
    cards: Annotated[Path, typer.Option(help="Folder of the cards.")] = Path("data_cards"),
    root: Annotated[Path, typer.Option(help="Folder that the paths in cards start from.")] = Path(),
) -> None:
    """Start the card of a data file, or check that it is complete and true. Exit code 3: it is not."""
    from align.data.cards import check_card
    from align.data.new_card import new_card

    if (init is None) != check_:
        raise ConfigError(Problem(f"align data card {name}", "wants one of --init FILE and --check"))
    path = cards / f"{name}.md"
    console = Console(highlight=False, soft_wrap=True)
    if init is not None:
        new_card(path, init, root, role or _guessed([str(init)], ReadSettings()))
        console.print(f"wrote {path}; next: replace every TODO, then `align data card {name} --check`", markup=False)
    elif problems := check_card(path, root):
        raise DataError(problems)
    else:
        console.print(f"{path} agrees with its file", markup=False)


def _read(arguments: list[str]) -> tuple[list[str], ReadSettings]:
    """The paths, and how they are read. Raises ConfigError."""
    paths = [argument for argument in arguments if "=" not in argument]
    if not paths:
        raise ConfigError(Problem(arguments[0], "there is no file to read", "name one before the settings"))
    return paths, read_settings([argument for argument in arguments if "=" in argument])


def _guessed(paths: list[str], settings: ReadSettings) -> Role:
    """What the files hold. Raises DataError where it is nothing that align knows."""
    from align.data.checking.check import guess_role

    return guess_role(paths, settings)


def _renderer(folder: Path | None) -> Renderer | None:
    """Raises ArtifactError."""
    if folder is None:
        return None
    from align.data.tokenizer import renderer_of

    return renderer_of(folder)


def _fixed(order: Order, checked: Checked, path: Path) -> dict[str, object] | None:
    """Writes the clean copy and says what is in it; None where leaving rows out would not make it clean."""
    from align.data.checking.clean import rejected_beside, write_clean
    from align.data.progress import progress

    if checked.incurable:
        return None
    if not checked.left_out.count(0):
        raise DataError(Problem(", ".join(order.paths), "no row is good, so there is no clean copy"))
    with progress("writing") as (advance, expect):
        expect(len(checked.left_out) + len(checked.rejected))
        kept = write_clean(order, checked, path, advance)
    return {"path": str(path), "rejected": str(rejected_beside(path)), "kept": kept, "left_out": len(checked.rejected)}
