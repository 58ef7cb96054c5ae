"""The start of a data card: what can be measured is filled in, the rest is left to a person."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from align.data.cards import HEADINGS, TODO, measured, size_category
from align.data.checking.check import Order, check
from align.data.checking.findings import Finding
from align.errors import ConfigError, DataError, Problem
from align.recipe.data_settings import Role
from align.records import write_text

STAGES = {
    Role.CORPUS: ["base"],
    Role.DEMONSTRATIONS: ["sft"],
    Role.PREFERENCES: ["reward", "dpo", "kto"],
    Role.JUDGEMENTS: ["kto", "reward", "dpo"],
    Role.PROMPTS: ["ppo"],
}
"""Kinds of stages that take such rows."""


def new_card(path: Path, data: Path, root: Path, role: Role) -> None:
    """Writes the card of a data file. Raises ConfigError where there is one, DataError if the file cannot be trained
    on."""
    if path.exists():
        raise ConfigError(Problem(str(path), "already exists, and is not overwritten", "choose another name"))
    if not data.is_file():
        raise DataError(Problem(str(data), "there is no such file", "a card describes one file"))
    facts = measured(data, role)
    rows = facts["rows"]
    front: dict[str, Any] = {
        "pretty_name": TODO,
        "language": [TODO],
        "license": TODO,
        "size_categories": [size_category(rows)],
        "annotations_creators": [TODO],
        "align": {
            "file": Path(os.path.relpath(data, root)).as_posix(),
            **facts,
            "role": str(role),
            "intended_use": STAGES[role],
            "personal_data": TODO,
        },
    }
    prose = dict.fromkeys(HEADINGS, TODO) | {"Composition": f"{_composition(data, role, rows)}\n\n{TODO}"}
    sections = "\n\n".join(f"## {heading}\n{text}" for heading, text in prose.items())
    write_text(path, f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{sections}\n")


def _composition(data: Path, role: Role, rows: int) -> str:
    """What the checks measured, in sentences."""
    checked = check(Order([str(data)], role), lambda number: None)
    (file,) = checked.files
    scripts = ", ".join(f"{count} {name}" for name, count in checked.measured["scripts"].items())
    said = [f"{rows} rows of {role}, in the columns {file.shape}.", f"Scripts: {scripts}."]
    if length := checked.measured.get("length"):
        said.append(
            f"The chosen answer is the longer one in {length['chosen_longer']:.0%} of the pairs, the shorter one in "
            f"{length['rejected_longer']:.0%}."
        )
    said += map(_sentence, checked.findings)
    return "\n".join(said)


def _sentence(finding: Finding) -> str:
    return f"Found by `align data check` ({finding.severity}): {finding.kind}, {finding.count}."
