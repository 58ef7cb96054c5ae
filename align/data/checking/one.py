"""One row of a file, as a stage reads it."""

from __future__ import annotations

from pathlib import Path

from align.data.faults import FileFault
from align.data.files import FileRows, RowProblem
from align.data.load import file_problem
from align.data.rows import Row
from align.data.sources import files_of, shown_path
from align.errors import ConfigError, DataError, Problem
from align.recipe.data_settings import ReadSettings, Role


def rows_at(path: str, number: int, role: Role, settings: ReadSettings) -> list[Row]:
    """What is made of row `number` of a file: in most shapes one row. Raises DataError with what is wrong with it."""
    problems: list[Problem] = []
    rows: list[Row] = []
    name, place = shown_path(Path(path)), ""
    num_rows = 0
    try:
        files = files_of(path, settings.files)
        if len(files) > 1:
            raise ConfigError(Problem(path, f"stands for {len(files)} files", f"name one, such as {files[0].name}"))
        name = files[0].name
        reader = FileRows(files[0], settings, role)
        place = f"{name}:{number}"
        for found in reader:
            if isinstance(found, RowProblem):
                problems += [found] if found.where == place else []
            elif found.row.source == place:
                rows.append(found.row)
        num_rows = reader.rows
    except FileFault as fault:
        problems.append(file_problem(name, fault))
    if problems:
        raise DataError(problems)
    if not rows:
        raise ConfigError(Problem(place, "there is no row", f"the file has {num_rows}"))
    return rows
