"""Tables for the terminal: a run's results and a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from align.data.checking.findings import Severity
from align.pipeline.plan import Action, Step

DASH = "–"
COLOURS = {Action.RUN: "yellow", Action.REUSE: "green", Action.RESUME: "cyan", Action.STALE: "magenta"}


def _number(metrics: Mapping[str, Any], key: str, digits: int) -> str:
    value = metrics.get(key)
    if value is None:
        return DASH
    if not isinstance(value, int | float):
        return escape(str(value))
    interval = metrics.get(f"{key}_ci95")
    if interval is None or key in WITHOUT_INTERVAL:
        return f"{value:.{digits}f}"
    low, high = interval
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return f"{value:.{digits}f} [dim]\\[{escape(str(low))}, {escape(str(high))}][/]"
    if abs((low + high) / 2 - value) < 0.1**digits / 2:  # symmetric, as those of means are
        return f"{value:.{digits}f} [dim]±{(high - low) / 2:.{digits}f}[/]"
    return f"{value:.{digits}f} [dim]\\[{low:.{digits}f}, {high:.{digits}f}][/]"


POLICY_COLUMNS: Sequence[tuple[str, str, int]] = (
    ("gold score", "gold", 3),
    ("KL", "kl", 2),
    ("reward", "reward", 2),
    ("EOS", "eos_rate", 2),
    ("length", "response_length", 1),
)
REWARD_COLUMNS: Sequence[tuple[str, str, int]] = (("held-out accuracy", "accuracy", 3),)
WITHOUT_INTERVAL = ("eos_rate", "response_length")
"""Their intervals are in summary.json; six columns of intervals do not fit a terminal of 80."""


def render_summary(summary: Mapping[str, Any]) -> RenderableType:
    """The results of a run (summary.json): policies, then reward models. ± and [] are 95% intervals."""
    stages: Mapping[str, Mapping[str, Any]] = summary["stages"]
    rewards = {name: metrics for name, metrics in stages.items() if _is_reward(metrics)}
    policies = {name: metrics for name, metrics in stages.items() if name not in rewards}
    tables = [
        _metrics_table(kind, columns, rows)
        for kind, columns, rows in (
            ("policy", POLICY_COLUMNS, policies),
            ("reward model", REWARD_COLUMNS, rewards),
        )
        if rows
    ]
    return Group(*tables)


def _is_reward(metrics: Mapping[str, Any]) -> bool:
    return "accuracy" in metrics and not any(key in metrics for _, key, _ in POLICY_COLUMNS)


def _metrics_table(kind: str, columns: Sequence[tuple[str, str, int]], rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(Column(kind, no_wrap=True), box=SIMPLE_HEAD, pad_edge=False)
    columns = [column for column in columns if any(column[1] in metrics for metrics in rows.values())]
    for title, _, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for name, metrics in rows.items():
        table.add_row(escape(name), *(_number(metrics, key, digits) for _, key, digits in columns))
    return table


def render_plan(steps: Sequence[Step]) -> RenderableType:
    """What each stage of a plan will do, why, and where; below, the models that will be in memory, and what looks odd
    in the data."""
    table = Table("stage", "action", "why", box=SIMPLE_HEAD)
    table.add_column("folder", overflow="fold")
    for step in steps:
        colour = COLOURS[step.action]
        folder = Path(step.job.directory)
        table.add_row(
            escape(step.job.stage),
            f"[{colour}]{step.action}[/]",
            escape("\n".join(step.reasons)),
            escape(relative(folder)),
        )
    telling = [step for step in steps if step.runs and step.models]
    parts: list[RenderableType] = [table, *([_models_table(telling)] if telling else [])]
    return Group(*parts, *_data_notes(steps))


def _data_notes(steps: Sequence[Step]) -> Iterator[Text]:
    """What looks odd in the data of each stage, a line for each kind; stages with the same data share theirs."""
    readers: dict[str, list[str]] = {}
    for step in steps:
        for setting, report in step.job.data_reports.items():
            for line in _report_lines(report):
                readers.setdefault(line, []).append(f"{step.job.stage}.{setting}")
    for line, names in readers.items():
        yield Text(f"{', '.join(names)}: {line}")


def _report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    rows = report["train"] + report["held_out"]
    if report["skipped"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in report["skipped"].items())
        yield f"left out: {kinds}"
    if report["looked_at"] < rows and report["findings"]:
        yield f"the following is of {report['looked_at']:,} of {rows:,} rows"
    hints = [finding for finding in report["findings"] if finding["severity"] == Severity.HINT]
    for finding in report["findings"]:
        if finding not in hints:
            place = finding["places"][0]
            yield f"warning: {finding['kind']}, {finding['count']:,}; {place['where']}: {place['what']}"
    if hints:
        kinds = ", ".join(f"{finding['kind']} {finding['count']:,}" for finding in hints)
        yield f"hints: {kinds} (`align data check` shows them)"


def _models_table(steps: Sequence[Step]) -> Table:
    """Numbered, because a long line is folded."""
    table = Table("stage", Column("", justify="right"), "models in memory", box=SIMPLE_HEAD)
    for step in steps:
        for number, line in enumerate(step.models, 1):
            table.add_row(escape(step.job.stage) if number == 1 else "", str(number), escape(line))
    return table


def relative(path: Path) -> str:
    """The path as the user would type it: relative to the current folder where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
