"""Loading a recipe: file, then command line, over the defaults of the typed settings; all problems at
once."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from align.errors import ConfigError, Problem
from align.recipe.data_settings import ReadSettings
from align.recipe.document import Document, read_document
from align.recipe.messages import explain
from align.recipe.overrides import Origins, Override, assign, parse_overrides
from align.recipe.reading import Reading, StageRecipe
from align.recipe.recipe_settings import RecipeSettings

if TYPE_CHECKING:
    from align.recipe.spec import StageSpec


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. Two are equal when they ask for the same, wherever they were read from."""

    path: Path | None = field(compare=False)
    """The file; None when everything came from the command line."""
    directory: Path = field(compare=False)
    """What relative paths in the file were resolved against."""
    settings: RecipeSettings
    stages: dict[str, StageRecipe]
    """By name: those of the file in its order, then those only the command line names."""

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults included, as plain JSON or YAML that loads back to an equal recipe."""
        stages = {name: stage.config.model_dump(mode="json") for name, stage in self.stages.items()}
        return {**self.settings.model_dump(mode="json"), **stages}


def load_recipe(
    path: Path | None,
    *,
    overrides: Sequence[str] = (),
    requested: Sequence[str] = (),
    specs: Mapping[str, StageSpec],
    model: str | None = None,
    data: str | None = None,
) -> Recipe:
    """Reads and validates a recipe. Raises ConfigError with every problem.

    `path` None means no file. `requested` stages that the file does not have get the defaults of their kind.
    `model` and `data` are the options --model and --data. On the command line, relative paths start from the
    current folder.
    """
    label = _label(path) if path else None
    document = read_document(path, label) if path and label else Document()
    given, problems = parse_overrides(overrides)
    options = {"model": model, "data": data}
    shortcuts = [Override(f"--{name} {value}", (name,), value) for name, value in options.items() if value is not None]
    written = copy.deepcopy(document.values)
    for override in (*shortcuts, *given):
        assign(written, override, 0)
    reading = Reading(
        values=document.values,
        origins=Origins(label, document.lines, [*shortcuts, *given], requested, written),
        specs=specs,
        directory=path.resolve().parent if path else Path.cwd(),
        problems=[*document.problems, *problems],
    )
    settings = reading.settings()
    stages = reading.stages()
    reading.check_data_option(stages)
    if settings is None or reading.problems:
        raise ConfigError(sorted(reading.problems, key=lambda problem: _line(problem, label)))
    return Recipe(path, reading.directory, settings, stages)


def read_settings(overrides: Sequence[str]) -> ReadSettings:
    """How files are read that are named elsewhere, from `columns.prompt=question` and the like. Raises ConfigError with
    every problem."""
    given, problems = parse_overrides(overrides)
    values: dict[str, Any] = {}
    for override in given:
        assign(values, override, 0)
        if override.path[0] == "path":
            problems.append(Problem(override.where, "the files are named without a key"))
    try:
        settings = ReadSettings.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems += explain(error, ReadSettings, values, (), Origins(None, overrides=given))
    if problems:
        raise ConfigError(problems)
    return settings


def _line(problem: Problem, label: str | None) -> float:
    """Sorts what is in the file by line, then the command line as it was typed."""
    line = problem.where.removeprefix(f"{label}:")
    return int(line) if line.isdigit() else math.inf


def _label(path: Path) -> str:
    """The file as messages name it: short inside the current folder."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
