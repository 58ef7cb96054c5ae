"""The figures of the pages in docs/: needs matplotlib, `pip install 'align-rlhf[bench]'`."""

from __future__ import annotations

from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from pages import DOCS

plt.switch_backend("svg")  # no display is needed
matplotlib.rcParams |= {
    "svg.hashsalt": "align",  # equal numbers give an equal file
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 9,
}


def panels(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A figure of panels beside each other that share their scales along rows and columns; axes (rows, columns)."""
    size = (3.6 * columns, 2.9 * rows)
    return plt.subplots(rows, columns, figsize=size, sharex="col", sharey="row", squeeze=False, layout="constrained")


def save_figure(figure: Any, name: str) -> None:
    """Writes docs/NAME.svg."""
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})
