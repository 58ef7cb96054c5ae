"""The text of the pages in docs/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

DOCS = Path(__file__).parent.parent / "docs"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def listed(versions: Mapping[str, str]) -> str:
    """Names and versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def spread(values: Sequence[float], digits: int) -> str:
    """Median, least and greatest, as tables show them: 1.43 (1.36 to 1.45)."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def save_page(name: str, text: str) -> None:
    """Writes docs/NAME.md and prints it."""
    (DOCS / f"{name}.md").write_text(text.strip() + "\n", encoding="utf-8")
    print(text)
