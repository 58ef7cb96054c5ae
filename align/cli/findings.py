"""What `align data check` found, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from align.data.checking.check import Checked
from align.data.checking.findings import Finding, Severity, counts
from align.data.faults import quoted
from align.data.files import FileReport
from align.recipe.data_settings import Role

COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.HINT: "cyan"}
LINES = 5
"""Lines of places below a finding; --json has more."""
TRAINED_BY = {Role.DEMONSTRATIONS: "sft", Role.PREFERENCES: "dpo", Role.JUDGEMENTS: "kto"}


def print_checked(checked: Checked, fixed: Mapping[str, Any] | None, called: str, *, has_tokenizer: bool) -> None:
    """Files, measurements, findings, what the clean copy has, and what to do next. `called`: the arguments of the
    command. Lines are never folded, so that they can be searched."""
    console = Console(highlight=False, soft_wrap=True)
    for file in checked.files:
        console.print(_file(file, checked.role))
    for part in (*_measured(checked.measured), *map(_finding, checked.findings)):
        console.print(part)
    levels = counts(checked.findings)
    total = ", ".join(f"{count:,} {level}{'s' * (count != 1)}" for level, count in levels.items() if count)
    console.print(Text(f"\n{total or 'nothing was found'}", style="bold"))
    if fixed:
        kept = f"wrote {fixed['path']}: {fixed['kept']:,} rows; {fixed['left_out']:,} left out"
        console.print(Text(f"{kept}, with reasons in {fixed['rejected']}"))
    elif checked.incurable:
        kinds = ", ".join(finding.kind for finding in checked.incurable)
        console.print(Text(f"leaving rows out does not mend: {kinds}"))
        return
    if step := _next(checked, fixed, called, has_tokenizer=has_tokenizer):
        console.print(Text(f"next: {step}", style="dim"))


def _next(checked: Checked, fixed: Mapping[str, Any] | None, called: str, *, has_tokenizer: bool) -> str:
    if checked.rejected and not fixed:
        return f"align data check {called} --fix clean.jsonl   # a copy of {checked.left_out.count(0):,} rows"
    data = fixed["path"] if fixed else called
    if not has_tokenizer:
        return f"align data check {data} --tokenizer MODEL   # lengths in tokens, chat template, ends, loss mask"
    stage = TRAINED_BY.get(checked.role)
    return f"align run {stage} --model MODEL --data {data}" if stage and " " not in data else ""


def _file(file: FileReport, role: Role) -> Text:
    held = f"{file.rows:,} rows, read as {role}" + (f", {file.kept:,} good" if file.kept != file.rows else "")
    blank = f", {file.blank_lines:,} blank lines" if file.blank_lines else ""
    shape = file.shape + (f" ({file.data_set})" if file.data_set else "")
    ignored = f"; ignored: {quoted(file.ignored_columns)}" if file.ignored_columns else ""
    return Text.assemble((file.name, "bold"), f": {held}{blank}; {shape or 'no shape'}{ignored}")


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
    """A headline, and its places below it: rows with the same fault on one line."""
    text = Text(f"\n{finding.severity}: ", style=COLOURS[finding.severity])
    text.append(f"{finding.kind}, {finding.count:,}", style="bold")
    text.append(f" ({finding.hint})" if finding.hint else "", style="not bold default")
    same: dict[tuple[str, str], list[str]] = {}
    for place in finding.places:
        name, colon, number = place.where.rpartition(":")
        whole = (f"{name}:", place.what) if colon and number.isdigit() else (place.where, place.what)
        same.setdefault(whole, []).append(number if whole[0] != place.where else "")
    shown = list(same.items())[:LINES]
    for (name, what), numbers in shown:
        text.append(f"\n  {name}{', '.join(numbers)}: {what}", style="not bold default")
    if rest := finding.count - sum(len(numbers) for _, numbers in shown):
        text.append(f"\n  and {rest:,} more", style="not bold default")
    return text
