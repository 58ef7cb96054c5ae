"""What `align data check` found, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from align.data.checking.check import Checked
from align.data.checking.findings import Finding, Severity, counts
from align.data.faults import quoted

COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.HINT: "cyan"}


def print_checked(checked: Checked, fixed: Mapping[str, Any] | None) -> None:
    """Files, measurements, findings, and what the clean copy has. Lines are never folded, so that they can be
    searched."""
    console = Console(highlight=False)
    console.print(_files(checked))
    console.print(Group(*_measured(checked.measured), *map(_finding, checked.findings)), soft_wrap=True)
    levels = counts(checked.findings)
    total = ", ".join(f"{count:,} {level}{'s' * (count != 1)}" for level, count in levels.items() if count)
    console.print(Text(f"\n{total or 'nothing was found'}", style="bold"))
    if fixed:
        kept = f"wrote {fixed['path']}: {fixed['kept']:,} rows; {fixed['left_out']:,} left out"
        console.print(Text(f"{kept}, with reasons in {fixed['rejected']}"), soft_wrap=True)
    elif checked.incurable:
        kinds = ", ".join(finding.kind for finding in checked.incurable)
        console.print(Text(f"leaving rows out does not mend: {kinds}"))


def _files(checked: Checked) -> Table:
    table = Table("file", f"read as {checked.role}", box=SIMPLE_HEAD)
    for name in ("rows", "good", "blank"):
        table.add_column(name, justify="right")
    for file in checked.files:
        shape = file.shape + (f" ({file.data_set})" if file.data_set else "")
        ignored = f"\nignored: {quoted(file.ignored_columns)}" if file.ignored_columns else ""
        numbers = (f"{number:,}" for number in (file.rows, file.kept, file.blank_lines))
        table.add_row(escape(file.name), escape(shape + ignored), *numbers)
    return table


def _measured(measured: Mapping[str, Any]) -> Iterator[Text]:
    if scripts := measured.get("scripts"):
        yield Text("script: " + ", ".join(f"{name} {count:,}" for name, count in scripts.items()))
    if length := measured.get("length"):
        yield Text(
            f"length: chosen is longer in {length['chosen_longer']:.0%}, shorter in {length['rejected_longer']:.0%}; "
            f"length alone is right in {length['rule_accuracy']:.0%}; mean {length['mean_chosen']:.0f} and "
            f"{length['mean_rejected']:.0f} characters"
        )
    if tokens := measured.get("tokens"):
        for name in ("rows", "answers"):
            if found := tokens[name]:
                sizes = f"median {found['median']}, 95% up to {found['p95']}, longest {found['max']}"
                yield Text(f"tokens of {name} ({tokens['template']} template): {sizes}")


def _finding(finding: Finding) -> Text:
    """A headline, and its places below it, one a line."""
    text = Text(f"\n{finding.severity}: ", style=COLOURS[finding.severity])
    text.append(f"{finding.kind}, {finding.count:,}", style="bold")
    text.append(f" ({finding.hint})" if finding.hint else "", style="not bold default")
    for place in finding.places:
        text.append(f"\n  {place.where}: {place.what}", style="not bold default")
    if finding.count > len(finding.places):
        text.append(f"\n  and {finding.count - len(finding.places):,} more", style="not bold default")
    return text
