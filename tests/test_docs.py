"""What the pages about PPO and DPO name is there: code, tests, rows of the checklist, losses, metrics and alarms.

Files are parsed and not imported, so that a page is checked in a moment.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

from stages.dpo.config import LOSS_SETTINGS, WITH_SFT
from stages.ppo.alarms import RULES

ROOT = Path(__file__).parents[1]
PAGES = ("checklist.md", "ppo.md", "dpo.md")
REFERENCE = re.compile(r"`(?P<path>[\w./]+\.py)?(?:::(?P<name>[\w.*]+))?`")
"""`path.py::name`, `path.py`, or `::name` in the file named before it. `*` stands for anything."""

METRIC = re.compile(r"[a-z]+/\w+")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables below a heading, without the tables' heads."""
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [cells for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE) for cells in _body(table)]


def _body(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[2:]]


def checklist() -> list[list[str]]:
    """Row, detail, ours, test."""
    headings = re.findall(r"^## (.*)$", page("checklist.md"), re.MULTILINE)
    return [row for heading in headings for row in rows(page("checklist.md"), heading)]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def references(text: str) -> Iterator[tuple[str, str | None]]:
    """Path and name of each reference in a text."""
    path = None
    for match in REFERENCE.finditer(text):
        path = match["path"] or path
        if match["path"] or match["name"]:
            assert path is not None, f"{match[0]} is in no file"
            yield path, match["name"]


def located(path: str) -> Path:
    """A file named without a folder is one of PPO's."""
    folder = "" if "/" in path else "tests/ppo/" if path.startswith("test_") else "stages/ppo/"
    return ROOT / folder / path


@cache
def names(path: Path) -> frozenset[str]:
    """Functions, classes and variables of a module, and those of its classes after a dot."""
    return frozenset(_names(ast.parse(path.read_text(encoding="utf-8")).body))


def _names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node.body, f"{prefix}{node.name}.")
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("name", PAGES)
def test_everything_named_exists(name):
    """Files, and what is said to be in them."""
    lost = [
        f"{path}::{what or ''}"
        for path, what in references(page(name))
        if not located(path).is_file() or (what and not any(fnmatchcase(one, what) for one in names(located(path))))
    ]
    assert lost == []


def test_the_checklist_is_complete():
    """Each row once, in order."""
    letters = {"R": "abcdefghijkl", "D": "abcdefghij"}
    expected = {*map(str, range(1, 85)), *(f"{kind}-{one}" for kind, ones in letters.items() for one in ones)}
    ids = [row[0] for row in checklist()]
    assert len(ids) == len(expected)
    assert set(ids) == expected
    assert ids[:84] == [str(number) for number in range(1, 85)]


@pytest.mark.parametrize("row", checklist(), ids=lambda row: row[0])
def test_a_row_names_its_code_and_its_test(row):
    """Or says why there is none: a row that is not offered needs no code, one without a test a reason."""
    _, detail, ours, test = row
    assert detail
    assert list(references(ours)) or "not offered" in ours
    if not test.startswith("none: "):
        found = list(references(test))
        assert found
        assert all(name and name.startswith("test_") for _, name in found)


def test_every_alarm_is_in_the_table():
    """And the table has no other."""
    documented = [name for row in rows(page("ppo.md"), "Alarms") for name in quoted(row[0])]
    assert documented == [rule.name for rule in RULES]


def test_the_table_of_alarms_says_how_long_and_how_bad():
    """Patience and fatality are those of the rules."""
    said = {
        name: (int(row[2]), "*stops*" in row[0]) for row in rows(page("ppo.md"), "Alarms") for name in quoted(row[0])
    }
    assert said == {rule.name: (rule.patience, rule.fatal) for rule in RULES}


def test_every_metric_is_in_the_table():
    """And the table has no other."""
    documented = {name for row in rows(page("ppo.md"), "Metrics") for name in quoted(row[0])}
    files = ("metrics.py", "correction.py", "loop.py", "report.py", "inflight.py", "kl.py")
    assert documented == set().union(*map(written, files))


def test_every_loss_is_in_the_table():
    """With the settings it takes, and their values where nothing is said."""
    table = {quoted(row[0])[0]: row[2] for row in rows(page("dpo.md"), "Losses of `dpo`") if row[0].startswith("`")}
    assert list(table)[: len(LOSS_SETTINGS)] == list(LOSS_SETTINGS)
    for loss, settings in LOSS_SETTINGS.items():
        said = dict(re.findall(r"`(\w+)`[ e=]* ([\d.]+)", table[loss]))
        expected = settings | ({"sft_weight": 1.0} if loss in WITH_SFT else {})
        assert {name: float(value) for name, value in said.items()} == expected


def test_every_metric_of_pairs_and_judgements_is_in_the_table():
    """What the trainers note at a step."""
    documented = {name for row in rows(page("dpo.md"), "Metrics") for name in quoted(row[0])}
    paths = ("align/training/responses.py", "stages/dpo/trainer.py", "stages/kto/trainer.py")
    noted = set().union(*map(_noted, paths))
    assert {"rewards/chosen", "kl", "entropy"} <= noted
    assert noted <= documented


def _noted(path: str) -> set[str]:
    """First arguments of `self.note`, for every value of the loop's variable in them."""
    sides = ("good", "bad") if "kto" in path else ("chosen", "rejected")
    code = located(path).read_text(encoding="utf-8")
    names = re.findall(r'self\.note\(f?"([^"]+)"', code)
    assert len(names) == code.count("self.note(")
    return {re.sub(r"\{\w+\}", side, name) for name in names for side in sides}


def written(path: str) -> set[str]:
    """The metrics that a file of PPO makes: all `group/name`, and the keys of whatever is called metrics."""
    found = set()
    for node in ast.walk(ast.parse(located(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr) and re.fullmatch(r"f'[a-z]+/\{\w+\}'", ast.unparse(node)):
            found.add(re.sub(r"\{.*\}", "TERM", ast.unparse(node)[2:-1]))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "metrics":
            found |= _texts([node.slice])
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "metrics":
            found |= _texts(node.value.keys if isinstance(node.value, ast.Dict) else [])
    return found


def _texts(nodes: Sequence[ast.expr | None]) -> set[str]:
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
