"""Data cards: what a data file is, where it came from and what it is for. Front matter is read and checked by code.

A card is a Markdown file in data_cards/: Hugging Face dataset-card front matter plus one `align:` block, then prose
under fixed headings. `align data card NAME --init FILE` starts one, `--check` compares it with its file, and
`python -m align.data.cards data_cards configs` checks every card.
"""

from __future__ import annotations

import sys
from math import log10
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError

from align.data.load import load
from align.errors import DataError, Problem
from align.recipe.nearest import did_you_mean
from align.recipe.settings import DataSettings, Role, Settings
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

    role: Role
    """What stages read it as."""

    intended_use: list[str]
    """Stage kinds it was made for, or `evaluation`."""

    personal_data: Literal["none", "possible", "yes"]
    """Whether people can be recognised in it."""


def read_card(path: Path) -> tuple[CardFacts, str]:
    """Facts and prose of a card. Raises DataError naming the card and the field that is wrong."""
    front, prose = _parts(path)
    try:
        return CardFacts.model_validate(front["align"]), prose
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
    facts, _ = read_card(path)
    problems = [Problem(str(path), f"`{name}` is missing or empty") for name in WANTED if not front.get(name)]
    problems += [
        Problem(str(path), f"the heading '## {heading}' is missing or empty")
        for heading in HEADINGS
        if not _section(prose, heading)
    ]
    data = root / facts.file
    if not data.is_file():
        return [*problems, Problem(str(path), f"{data} does not exist")]
    if (found := sha256_file(data)) != facts.sha256:
        problems.append(Problem(str(path), f"sha256 of {data} is {found}, the card says {facts.sha256}"))
    rows = num_rows(data, facts.role)
    if rows != facts.rows:
        problems.append(Problem(str(path), f"{data} has {rows} rows, the card says {facts.rows}"))
    if front.get("size_categories") != [size_category(rows)]:
        what = f"size_categories is {front.get('size_categories')}, the file's is [{size_category(rows)}]"
        problems.append(Problem(str(path), what))
    return problems


def num_rows(data: Path, role: Role) -> int:
    """How many rows a stage gets from a file. Raises DataError."""
    return len(load(DataSettings(path=str(data), held_out=0.0), role).train)


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
