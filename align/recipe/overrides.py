"""`ppo.kl.coef=0.1` on the command line, and where a value comes from: an override or a line of the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from align.errors import ConfigError, Problem
from align.recipe.document import check, compose, is_secret, secret_problem, values_of
from align.recipe.schema import KeyPath, dotted

ON_COMMAND_LINE = "(command line)"


@dataclass(frozen=True)
class Override:
    """One value from the command line, `Override("ppo.seed=3", ("ppo", "seed"), 3)`. It replaces what is at
    `path`."""

    text: str
    path: tuple[str, ...]
    value: Any

    @property
    def where(self) -> str:
        """The `where` of a problem this override causes."""
        return f"{self.text} {ON_COMMAND_LINE}"


def parse_overrides(texts: Iterable[str]) -> tuple[list[Override], list[Problem]]:
    """The overrides that can be read, and what is wrong with the others."""
    overrides, problems = [], []
    for text in texts:
        try:
            overrides.append(parse_override(text))
        except ConfigError as error:
            problems += error.problems
    return overrides, problems


def parse_override(text: str) -> Override:
    """Reads `dotted.key=value`; the value is YAML: 1e-5, null, [a, b], {key: value}. Raises ConfigError."""
    key, equals, value = text.partition("=")
    where = f"{text} {ON_COMMAND_LINE}"
    path = tuple(key.split("."))
    if not equals:
        raise ConfigError(Problem(where, "an override needs a value", f"write `{text}=VALUE`"))
    if "[" in key:
        hint = f"write the list: `{key.partition('[')[0]}=[...]`"
        raise ConfigError(Problem(where, "one item of a list cannot be set", hint))
    if not all(path):
        raise ConfigError(Problem(where, "a part of the dotted key is empty", "write `stage.setting=value`"))
    if is_secret(path[-1]):
        raise ConfigError(secret_problem(f"{key}=... {ON_COMMAND_LINE}"))
    node = compose(value, lambda line: where)
    if node is None:
        raise ConfigError(
            Problem(where, "nothing after the equals sign", f"write `{key}=null`, or quotes for empty text")
        )
    if isinstance(node, yaml.MappingNode):  # it may hold a misplaced secret, which must not be shown
        where = f"{key}={{...}} {ON_COMMAND_LINE}"
    # Checked as the one item of a mapping, so that messages name the key.
    leaf = yaml.ScalarNode("tag:yaml.org,2002:str", path[-1], node.start_mark, node.end_mark)
    item = yaml.MappingNode("tag:yaml.org,2002:map", [(leaf, node)])
    problems: list[Problem] = []
    check(item, path[:-1], lambda line: where, {}, problems)
    if problems:  # `where` shows the key already
        raise ConfigError([replace(item, what=item.what.removeprefix(f"{key}: ")) for item in problems])
    return Override(text, path, values_of(item)[path[-1]])


def assign(values: dict[str, Any], override: Override, depth: int) -> None:
    """Puts an override in place; `values` is the mapping `depth` keys below the top. What is in the way is
    replaced, and the validation says so."""
    *parents, leaf = override.path[depth:]
    for part in parents:
        inner = values.get(part)
        values[part] = values = inner if isinstance(inner, dict) else {}
    values[leaf] = override.value


@dataclass(frozen=True)
class Origins:
    """Where every value was given, for the `where` of problems."""

    label: str | None
    """The recipe file as the user would name it; None without one."""
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: list[Override] = field(default_factory=list)
    requested: Sequence[str] = ()
    """Stages named on the command line."""
    written: dict[str, Any] = field(default_factory=dict)
    """The values of file and overrides as they were written, shorthands included."""

    def problem(self, path: KeyPath, what: str, hint: str = "") -> Problem:
        """A problem with the value at `path`. The dotted key is left out where the override shows it."""
        where, key = self.where(path, what), dotted(self.as_written(path))
        shown = not key or where.startswith((f"{key}=", f"{key} "))
        return Problem(where, what if shown else f"{key}: {what}", hint)

    def where(self, path: KeyPath, message: str = "") -> str:
        """The override that set the value at `path`, else its line, else the line of what it is in.

        A message about a whole mapping is put on the override of the key it mentions.
        """
        path = self.as_written(path)
        newest = self.overrides[::-1]
        below = [override for override in newest if override.path[: len(path)] == path]
        causes = [override for override in newest if override.path == path[: len(override.path)]]
        causes += [override for override in below if override.path[-1] in re.split(r"\W+", message)]
        lines = [self.lines[path[:size]] for size in range(len(path), 0, -1) if path[:size] in self.lines]
        if causes or (below and not lines):
            return (causes or below)[0].where
        if lines:
            return f"{self.label}:{lines[0]}"
        return f"{path[0]} {ON_COMMAND_LINE}" if path and path[0] in self.requested else ON_COMMAND_LINE

    def as_written(self, path: KeyPath) -> KeyPath:
        """The path without the keys that a shorthand left out: `ppo.reward[1]` for `ppo.reward.reward.model[1]`."""
        kept, current = [], self.written
        for part in path:
            if isinstance(current, dict) or (isinstance(current, list) and isinstance(part, int)):
                kept.append(part)
                current = _inside(current, part)
        return tuple(kept)

    def from_command_line(self, path: KeyPath) -> bool:
        """Whether the value at `path` was given on the command line."""
        return any(override.path == path[: len(override.path)] for override in self.overrides)


def _inside(container: Any, part: str | int) -> Any:
    """What `part` of a mapping or list holds; a mapping where nothing was written, whose keys are then all kept."""
    held: dict[str | int, Any] = dict(enumerate(container)) if isinstance(container, list) else container
    return {} if held.get(part) is None else held[part]
