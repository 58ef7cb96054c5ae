"""The `align` command: one Typer app, and what happens to errors that reach the top.

Command modules import `app` from here and register themselves; they import what is slow inside their
functions.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from align.errors import AlignError, ProblemsError

app = typer.Typer(
    name="align",
    help="One command from a base language model to an aligned one: `align run sft reward ppo`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,  # locals can hold tokens
)


def main() -> None:
    """Entry point of the console script. Ctrl-C exits 130; an AlignError exits with its own code, without
    traceback."""
    try:
        app()
    except AlignError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def print_error(error: AlignError) -> None:
    """Writes an error to stderr, one problem per line. Lines are never folded, so that they can be
    searched."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    count = len(error.problems) if isinstance(error, ProblemsError) else 1
    if count == 1:
        console.print("[bold red]error:[/]", end=" ")
    else:
        console.print(f"[bold red]{count} errors:[/]")
    console.print(str(error), markup=False)  # holds what the user or a file wrote: never read it as markup
