"""Markdown tables and figures of the pages in docs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")  # no display is needed
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
plt.rcParams |= {
    "svg.hashsalt": "align",  # equal numbers give an equal file
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 9,
}


def panels(count: int, rows: int = 1) -> tuple[Any, Any]:
    """A figure of `count` panels beside each other, in `rows` rows; axes (rows, count)."""
    return plt.subplots(
        rows, count, figsize=(3.6 * count, 3.2 * rows), sharex="col", sharey="row", squeeze=False, layout="constrained"
    )


def save_figure(figure: Any, name: str) -> None:
    """Writes docs/NAME.svg."""
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


def save_page(name: str, text: str) -> None:
    """Writes docs/NAME.md and prints it."""
    (DOCS / f"{name}.md").write_text(text.strip() + "\n", encoding="utf-8")
    print(text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
