"""The data of a plan: what is wrong with it stops the plan; what looks odd is told, and kept in the stage's record.

Looked at once: what was found is kept in the cache that runs share, by the content of the files and how they are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.data.cards import Card, finished_cards
from align.data.checking.look import look
from align.data.contamination import Contamination
from align.data.load import files_read, load
from align.errors import DataError, Problem, WriteError
from align.pipeline.external import HashCache
from align.pipeline.fingerprint import CACHE, Contents
from align.pipeline.graph import Node
from align.recipe.data_settings import DataSettings, Role
from align.recipe.load import Recipe
from align.recipe.shipped import shipped_folder
from align.records import fingerprint, write_json

VERSION = 2
"""Goes up whenever the same data would be reported otherwise."""

CARDS = "data_cards"

Report = dict[str, Any]
"""What `align.data.checking.look` found in a file, and the facts of its data cards, as plain JSON."""


class Reports:
    """Reports on data, each made once."""

    def __init__(self, runs: Path, contents: Contents, evaluation: DataSettings | None):
        self.evaluation = evaluation
        self._contents = contents
        self._folder = runs / CACHE / "reports" if runs.is_dir() else None
        self._made: dict[str, Report] = {}
        self._measured: Contamination | None = None

    def of(self, data: DataSettings, role: Role) -> Report:
        """The report on some data. Raises DataError with everything that is wrong with it."""
        compared = [] if data is self.evaluation or not self.evaluation else [self.evaluation]
        read = [(item.model_dump(mode="json"), self._contents[item]) for item in (data, *compared)]
        name = fingerprint([VERSION, str(role), read])[:16] + ".json"
        if name not in self._made:
            self._made[name] = self._kept(name) or self._new(name, data, role, is_compared=bool(compared))
        return self._made[name]

    def _kept(self, name: str) -> Report | None:
        with suppress(OSError, ValueError):
            return json.loads((self._folder / name).read_text(encoding="utf-8")) if self._folder else None

    def _new(self, name: str, data: DataSettings, role: Role, *, is_compared: bool) -> Report:
        report = look(load(data, role), role, self._measured_on() if is_compared else None)
        if self._folder:
            with suppress(WriteError):  # a folder that may only be read can still be planned in
                write_json(self._folder / name, report)
        return report

    def _measured_on(self) -> Contamination:
        if self._measured is None:
            assert self.evaluation is not None
            prompts = load(self.evaluation.model_copy(update={"held_out": 0.0}), Role.PROMPTS)
            self._measured = Contamination()
            for prompt, key in zip(prompts.train, prompts.train_keys, strict=True):
                self._measured.add(prompt, key)
        return self._measured


def check_data(nodes: Sequence[Node], reports: Reports) -> dict[str, dict[str, Report]]:
    """Reports on the data of some stages, by stage and setting (`data`, `ptx.data`). Raises DataError with all
    problems, those of the evaluation's data too."""
    problems: list[Problem] = []

    def found(data: DataSettings, role: Role) -> Report:
        try:
            return reports.of(data, role)
        except DataError as error:
            problems.extend(problem for problem in error.problems if problem not in problems)
            return {}

    if nodes and reports.evaluation:
        found(reports.evaluation, Role.PROMPTS)
    by_stage = {node.name: {setting: found(data, role) for setting, data, role in node.reads()} for node in nodes}
    if problems:
        raise DataError(problems)
    return by_stage


def described(
    reports: dict[str, dict[str, Report]], recipe: Recipe, nodes: Sequence[Node], hashes: HashCache
) -> dict[str, dict[str, Report]]:
    """The reports, each with the facts of the data cards of its files as `cards`. Cards lie in data_cards/ beside the
    recipe, or beside the recipes that come with align. Raises DataError where a file is not what its card says."""
    cards = _cards(recipe.directory)
    problems: list[Problem] = []
    whole: dict[str, dict[str, Report]] = {name: {} for name in reports}
    for node in nodes:
        for setting, data, _ in node.reads() if node.name in reports else ():
            report = reports[node.name][setting]
            facts: list[dict[str, Any]] = []
            for file, read in zip(files_read(data), report["files"], strict=True):
                digest = hashes.sha256(file.path)
                for place, card in cards:
                    if digest == card.facts.sha256 or file.path.resolve() == place:
                        rows = read["kept"] if report["role"] == card.facts.role else card.facts.rows
                        problems += _disagreement(card, file.name, digest, rows)
                        facts.append(card.as_json())
            whole[node.name][setting] = report | {"cards": facts}
    if problems:
        raise DataError(list(dict.fromkeys(problems)))
    return whole


def _cards(directory: Path) -> list[tuple[Path, Card]]:
    """Each card, and where its file would be."""
    shipped = shipped_folder()
    homes = {(shipped.parent / CARDS).resolve(): shipped}
    homes.setdefault((directory / CARDS).resolve(), directory)
    return [
        ((root / card.facts.file).resolve(), card) for folder, root in homes.items() for card in finished_cards(folder)
    ]


def _disagreement(card: Card, file: str, digest: str, rows: int) -> list[Problem]:
    """What a card says otherwise than its file is: its hash, or else the number of its rows."""
    hint = f"`align data card {card.path.stem} --check` compares them"
    for name, found, said in (("sha256", digest, card.facts.sha256), ("number of rows", rows, card.facts.rows)):
        if found != said:
            return [Problem(file, f"its {name} is {found}, its data card {card.path} says {said}", hint)]
    return []
