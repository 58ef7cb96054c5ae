"""What `align plan --memory` and `--gpu` print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from align.cli.table import DASH
from align.pipeline.estimate.memory import PARTS, Device
from align.pipeline.estimate.stage import METHODS, Estimate, Known

GIB = 2**30
Found = Mapping[str, Known | str]
"""What is known of each stage, or why nothing is."""


def memory_json(found: Found, device: Device | None) -> dict[str, Any]:
    """By stage: the estimate on a CPU or, with `--gpu`, on that GPU, and what would fit."""
    stages: dict[str, Any] = {}
    for name, known in found.items():
        if isinstance(known, str):
            stages[name] = {"unknown": known}
            continue
        stages[name] = known.estimate(device or Device()).as_json()
        if device is not None:
            stages[name]["strategies"] = {
                strategy: {method: _cell_json(estimate, device) for method, estimate in row.items()}
                for strategy, row in known.table(device).items()
            }
    return stages


def render_memory(found: Found, device: Device | None) -> RenderableType:
    """One table of all stages and, with `--gpu`, one for each stage of what would fit."""
    estimates = {name: known.estimate(device or Device()) for name, known in found.items() if isinstance(known, Known)}
    tables: list[RenderableType] = [_summary(estimates, device)] if estimates else []
    if device is not None:
        tables += [_fits(known, device) for known in found.values() if isinstance(known, Known)]
    notes = [
        f"{escape(name)} is not estimated: {escape(known)}" for name, known in found.items() if isinstance(known, str)
    ]
    return Group(*tables, *notes)


def _summary(estimates: Mapping[str, Estimate], device: Device | None) -> Table:
    table = Table(Column("estimate", no_wrap=True), box=SIMPLE_HEAD, pad_edge=False)
    for name in estimates:
        table.add_column(escape(name), justify="right")
    peak = f"peak of a {'GPU' if device else 'process'}, GiB"
    roles = dict.fromkeys(role for one in estimates.values() for role in one.memory.models)
    lines: dict[str, Callable[[Estimate], str]] = {
        "parameters": lambda one: count(one.parameters),
        "trained": lambda one: count(one.trained),
        "optimiser steps": lambda one: count(one.work.num_steps),
        "tokens": lambda one: count(one.work.tokens),
        "strategy": lambda one: one.strategy,
        peak: lambda one: f"[bold]{gib(one.memory.peak)}[/]",
        "  while": lambda one: one.memory.phase,
        **{f"  {part}": partial(_size, part=part) for part in PARTS},
        **({f"model {role}, GiB": partial(_model, role=role) for role in roles} if len(roles) > 1 else {}),
        "KV cache while sampling, GiB": lambda one: gib(one.memory.cache),
        "disk of a checkpoint, GiB": lambda one: f"{gib(one.checkpoint)} x {one.work.checkpoints}",
        "disk of the artifact, GiB": lambda one: gib(one.artifact),
    }
    for title, value in lines.items():
        values = [value(one) for one in estimates.values()]
        if set(values) != {DASH}:
            table.add_row(escape(title), *values)
    return table


def _size(one: Estimate, part: str) -> str:
    size = one.memory.parts.get(part)
    return gib(size) if size else DASH


def _model(one: Estimate, role: str) -> str:
    """Weights, gradients and optimiser of a role."""
    return gib(one.memory.models[role]) if role in one.memory.models else DASH


def _fits(known: Known, device: Device) -> Table:
    """GiB of each GPU by strategy and method, green where that is at most what it has; + what is elsewhere."""
    assert device.memory is not None
    title = f"{escape(known.stage)} on {device.count} x {gib(device.memory)} GiB"
    table = Table(Column(title, no_wrap=True), box=SIMPLE_HEAD, pad_edge=False)
    for method in METHODS:
        table.add_column(f"{method}, GiB")
    for strategy, row in known.table(device).items():
        table.add_row(strategy, *(_cell(estimate, device) for estimate in row.values()))
    return table


def _cell(estimate: Estimate | None, device: Device) -> str:
    if estimate is None:
        return DASH
    found = estimate.memory
    colour, word = ("green", "fits") if fits(estimate, device) else ("red", "no")
    besides = {"host": found.host, "disk": found.disk}
    elsewhere = [f"{gib(size * estimate.processes)} {name}" for name, size in besides.items() if size]
    return f"[{colour}]{gib(found.peak)} {word}[/]" + (f" [dim]+ {', '.join(elsewhere)}[/]" if elsewhere else "")


def _cell_json(estimate: Estimate | None, device: Device) -> dict[str, Any] | None:
    if estimate is None:
        return None
    found = estimate.memory
    return {
        "fits": fits(estimate, device),
        "peak": round(found.peak),
        "phase": found.phase,
        "host": round(found.host * estimate.processes),
        "disk": round(found.disk * estimate.processes),
    }


def fits(estimate: Estimate, device: Device) -> bool:
    """Whether the peak is at most a GPU's memory."""
    return device.memory is not None and estimate.memory.peak <= device.memory


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def count(number: int | None) -> str:
    """A number in three digits: 81.8M; `unknown` for None."""
    if number is None:
        return "unknown"
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 10 * size or (number >= size and unit != "k"):
            return f"{number / size:.3g}{unit}"
    return str(number)
