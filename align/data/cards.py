"""Data cards: what a data file is, where it came from and what it is for. Front matter is read and checked by code.

A card is a Markdown file in data_cards/: Hugging Face dataset-card front matter plus one `align:` block, then prose
under fixed headings. `python -m align.data.cards data_cards configs` checks every card against its file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError

from align.data.load import load
from align.errors import DataError, Problem
from align.recipe.settings import DataSettings, Role, Settings
from align.records import sha256_file

HEADINGS = (
    "Summary",
    "Composition",
    "Provenance",
    "Intended and unsuitable use",
    "Bias, risks and limits",
    "Personal and sensitive data",
    "Licence",
)


class CardFacts(Settings):
    """The `align:` block: facts that are checked against the file."""

    file: str
    """Path of the data file, relative to the configs folder."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of its bytes."""

    rows: PositiveInt
    """Number of rows."""

    role: Role
    """What stages read it as."""

    intended_use: list[str]
    """Stage kinds it was made for, or `evaluation`."""

    personal_data: Literal["none", "possible", "yes"]
    """Whether people can be recognised in it."""


def read_card(path: Path) -> tuple[CardFacts, str]:
    """Facts and prose of a card. Raises DataError naming the card and the field that is wrong."""
    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        raise DataError(Problem(str(path), "no front matter between two lines of ---"))
    front = yaml.safe_load(parts[1])
    try:
        return CardFacts.model_validate(front["align"]), parts[2]
    except KeyError as error:
        raise DataError(Problem(str(path), "the front matter has no `align:` block")) from error
    except ValidationError as error:
        faults = [Problem(str(path), f"align.{'.'.join(map(str, one['loc']))}: {one['msg']}") for one in error.errors()]
        raise DataError(faults) from error


def check_card(path: Path, configs: Path) -> list[Problem]:
    """Everything in which a card and its file disagree; empty when they agree."""
    facts, prose = read_card(path)
    problems = [
        Problem(str(path), f"the heading '## {heading}' is missing or empty")
        for heading in HEADINGS
        if not _section(prose, heading)
    ]
    data = configs / facts.file
    if not data.is_file():
        return [*problems, Problem(str(path), f"{data} does not exist")]
    if (found := sha256_file(data)) != facts.sha256:
        problems.append(Problem(str(path), f"sha256 of {data} is {found}, the card says {facts.sha256}"))
    rows = len(load(DataSettings(path=str(data), held_out=0.0), facts.role).train)
    if rows != facts.rows:
        problems.append(Problem(str(path), f"{data} has {rows} rows, the card says {facts.rows}"))
    return problems


def check_cards(cards: Path, configs: Path) -> list[Problem]:
    """Problems of every card of a folder, and data files of the configs that have no card."""
    paths = sorted(cards.glob("*.md"))
    described = {read_card(path)[0].file for path in paths}
    files = {str(path.relative_to(configs)) for path in configs.rglob("*.jsonl")}
    missing = [
        Problem(str(configs / name), f"no card in {cards} describes this file") for name in sorted(files - described)
    ]
    return [problem for path in paths for problem in check_card(path, configs)] + missing


def _section(prose: str, heading: str) -> str:
    _, found, rest = prose.partition(f"## {heading}\n")
    return rest.split("\n## ")[0].strip() if found else ""


if __name__ == "__main__":
    faults = check_cards(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(map(str, faults)) or "all cards agree with their files")
    sys.exit(bool(faults) * DataError.exit_code)
