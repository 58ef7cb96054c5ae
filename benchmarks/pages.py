"""The text of the pages in docs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def save_page(name: str, text: str) -> None:
    """Writes docs/NAME.md and prints it."""
    (DOCS / f"{name}.md").write_text(text.strip() + "\n", encoding="utf-8")
    print(text)
