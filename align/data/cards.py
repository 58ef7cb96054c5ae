"""Data cards: what a data file is, where it came from and what it is for. Front matter is read and checked by code.

A card is a Markdown file in data_cards/: Hugging Face dataset-card front matter plus one `align:` block, then prose
under fixed headings. `align data card NAME --init FILE` starts one, `--check` compares it with its file, and
`python -m align.data.cards data_cards configs` checks every card.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from align.data.licences import licence_fault
from align.data.load import load
from align.data.readers import survey
from align.errors import DataError, Problem
from align.recipe.data_settings import DataSettings, Role
from align.recipe.nearest import did_you_mean
from align.recipe.settings import Settings
from align.records import sha256_file

WANTED = ("pretty_name", "language", "license", "annotations_creators")
"""Front matter that only a person can fill in."""
HEADINGS = (
    "Summary",
    "Composition",
    "Provenance",
    "Intended and unsuitable use",
    "Bias, risks and limits",
    "Personal and sensitive data",
    "Licence",
)


TODO = "TODO"
"""Stands in a new card where a person has something to say."""


class CardFacts(Settings):
    """The `align:` block: facts that are checked against the file."""

    file: str
    """Path of the data file, relative to the root that the card is checked with (here: configs)."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of its bytes."""

    rows: PositiveInt
    """Number of rows."""

    columns: list[str]
    """Every column that a row has."""

    splits: dict[Literal["train", "held_out"], NonNegativeInt]
    """Rows that stages train on and keep out with the default `held_out`."""

    role: Role
    """What stages read it as."""

    intended_use: list[str]
    """Stage kinds it was made for, or `evaluation`."""

    personal_data: Literal["none", "possible", "yes"]
    """Whether people can be recognised in it."""


@dataclass(frozen=True)
class Card:
    """A card that is read."""

    path: Path
    front: dict[str, Any]
    prose: str
    facts: CardFacts

    def as_json(self) -> dict[str, Any]:
        """What a run that uses the file keeps of it."""
        named = {"card": self.path.stem, "licence": self.front.get("license"), "languages": self.front.get("language")}
        return named | self.facts.model_dump(mode="json")


def read_card(path: Path) -> Card:
    """A card. Raises DataError naming the card and the field that is wrong."""
    front, prose = _parts(path)
    try:
        return Card(path, front, prose, CardFacts.model_validate(front["align"]))
    except KeyError as error:
        raise DataError(Problem(str(path), "the front matter has no `align:` block")) from error
    except ValidationError as error:
        faults = [Problem(str(path), f"align.{'.'.join(map(str, one['loc']))}: {one['msg']}") for one in error.errors()]
        raise DataError(faults) from error


def _parts(path: Path) -> tuple[dict[str, Any], str]:
    """The front matter, which is Hugging Face's but for the `align:` block, and the prose. Raises DataError."""
    if not path.is_file():
        hint = did_you_mean(path.stem, [card.stem for card in path.parent.glob("*.md")])
        raise DataError(Problem(str(path), "there is no such card", hint))
    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        raise DataError(Problem(str(path), "no front matter between two lines of ---"))
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise DataError(Problem(str(path), f"the front matter is not YAML: {' '.join(str(error).split())}")) from error
    if not isinstance(front, dict):
        raise DataError(Problem(str(path), "the front matter is not a mapping"))
    return front, parts[2]


def check_card(path: Path, root: Path) -> list[Problem]:
    """Everything that a card lacks, and in which it and its file disagree; empty when it is whole and true."""
    front, prose = _parts(path)
    if num_left := str((front, prose)).count(TODO):
        return [Problem(str(path), f"it has {num_left} {TODO} left", "replace them")]
    facts = read_card(path).facts
    problems = [Problem(str(path), f"`{name}` is missing or empty") for name in WANTED if not front.get(name)]
    problems += [
        Problem(str(path), f"the heading '## {heading}' is missing or empty")
        for heading in HEADINGS
        if not _section(prose, heading)
    ]
    if fault := licence_fault(front):
        problems.append(Problem(str(path), fault))
    data = root / facts.file
    if not data.is_file():
        return [*problems, Problem(str(path), f"{data} does not exist")]
    said = facts.model_dump()
    for name, found in measured(data, facts.role).items():
        if found != said[name]:
            problems.append(Problem(str(path), f"{name} of {data}: {shown(found)}, the card says {shown(said[name])}"))
    if front.get("size_categories") != [size_category(facts.rows)]:
        what = f"size_categories is {front.get('size_categories')}, the file's is [{size_category(facts.rows)}]"
        problems.append(Problem(str(path), what))
    return problems


def measured(data: Path, role: Role) -> dict[str, Any]:
    """The facts of a card that a file has itself. Raises DataError."""
    rows = load(DataSettings(path=str(data)), role)
    splits = {"train": len(rows.train), "held_out": len(rows.held_out)}
    return {
        "sha256": sha256_file(data),
        "rows": sum(splits.values()),
        "columns": survey(data).columns,
        "splits": splits,
    }


def shown(value: object) -> str:
    """A fact in one line."""
    return value if isinstance(value, str) else json.dumps(value)


def finished_cards(folder: Path) -> list[Card]:
    """The cards of a folder that have no TODO left. Raises DataError."""
    return [read_card(path) for path in sorted(folder.glob("*.md")) if TODO not in path.read_text(encoding="utf-8")]


def size_category(rows: int) -> str:
    """The name that Hugging Face gives to data sets of this size: powers of ten from a thousand on."""
    if rows < 1000:
        return "n<1K"
    power = int(log10(rows) + 1e-9)
    return f"{_short(power)}<n<{_short(power + 1)}"


def _short(power: int) -> str:
    """A power of ten as 10K, 1M, 100B."""
    return f"{10 ** (power % 3)}{'KMBT'[power // 3 - 1]}"


def check_cards(cards: Path, configs: Path) -> list[Problem]:
    """Problems of every card of a folder, and data files of the configs that have no card."""
    paths = sorted(cards.glob("*.md"))
    described = {read_card(path).facts.file for path in paths}
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
