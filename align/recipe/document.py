"""A YAML recipe as plain values, with the line of every key, and with the parts of YAML that mislead refused.

Refused: aliases, tags, interpolation, duplicate keys, `yes` and `no`, 012 and 1:30, NaN, and anything named
like a secret. A recipe is copied into every run folder and compared between runs, so it has to mean what it
shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from align.errors import ConfigError, Problem
from align.recipe.nearest import nearest
from align.recipe.schema import KeyPath, dotted

Where = Callable[[int], str]
"""Line number (from 1) to the `where` of a problem."""

_SECRET = re.compile(r"(?i)(?:^|_)(?<!eos_)(?<!pad_)(?<!bos_)(token|password|passwd|secret|api_?key|credentials?)$")
_SWITCH = re.compile(r"(?i)yes|no|on|off")
_ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9]+(:[0-5]?[0-9])+)")
_NOT_FINITE = re.compile(r"(?i)[-+]?\.(inf|nan)")


@dataclass
class Document:
    """The values of a recipe file, where each one is, and what is wrong with how they are written."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_document(path: Path, label: str) -> Document:
    """Reads a recipe. Raises ConfigError when nothing can be read; lesser problems are in the document."""

    def where(line: int) -> str:
        return f"{label}:{line}"

    node = compose(_read_text(path, label), where)
    if node is None:
        raise ConfigError(Problem(label, "the file is empty", "`align init` copies a complete recipe"))
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(Problem(where(_line(node)), "a recipe is a mapping of settings and stages, `seed: 0`"))
    document = Document()
    check(node, (), where, document.lines, document.problems)
    document.values = values_of(node)
    return document


def compose(text: str, where: Where) -> yaml.Node | None:
    """The node tree of a YAML text. Raises ConfigError on bad syntax and on all aliases and tags."""
    try:
        problems = [
            Problem(where(event.start_mark.line + 1), *reason)
            for event in yaml.parse(text, yaml.SafeLoader)
            if (reason := _refused(event))
        ]
        if problems:
            raise ConfigError(problems)
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(error, where)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(Problem(where(line), f"character {text[error.position]!r} is not allowed in YAML")) from None


def check(node: yaml.Node, path: KeyPath, where: Where, lines: dict[KeyPath, int], problems: list[Problem]) -> None:
    """Fills `lines` and `problems` from a node tree, and takes what is refused out of it, so that the rest
    can be checked as well."""
    if isinstance(node, yaml.MappingNode):
        kept: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            here = where(_line(key))
            problem = _key_problem(key, path, here, first=kept) or _value_problem(value, (*path, key.value), here)
            if problem:
                problems.append(problem)
                continue
            kept[key.value] = (key, value)
            lines[(*path, key.value)] = _line(key)
            check(value, (*path, key.value), where, lines, problems)
        node.value = list(kept.values())
    elif isinstance(node, yaml.SequenceNode):
        items = []
        for value in node.value:
            problem = _value_problem(value, (*path, len(items)), where(_line(value)))
            if problem:
                problems.append(problem)
                continue
            lines[(*path, len(items))] = _line(value)
            check(value, (*path, len(items)), where, lines, problems)
            items.append(value)
        node.value = items


def values_of(node: yaml.MappingNode) -> dict[str, Any]:
    """The plain values of a checked node tree, as OmegaConf reads them: 1e-5 is a number."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(yaml.serialize(node))))


def is_secret(key: str) -> bool:
    """Whether a key is named like something that must not be written down."""
    return bool(_SECRET.search(key))


def secret_problem(where: str, key: str = "") -> Problem:
    """The refusal of a secret; never shows its value."""
    what = f"{key}: " * bool(key) + "secrets do not belong in a recipe, which is copied into every run"
    return Problem(where, what, "set it in the environment, such as HF_TOKEN or WANDB_API_KEY")


def _read_text(path: Path, label: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        match = nearest(path.name, beside)
        hint = f"did you mean `{Path(label).with_name(match)}`?" if match else "`align init --list` shows those shipped"
        raise ConfigError(Problem(label, "no such recipe file", hint)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(Problem(label, f"not UTF-8 text (byte {error.start})", "is it a recipe?")) from None
    except OSError as error:
        raise ConfigError(Problem(label, f"cannot be read: {error.strerror}")) from None


def _refused(event: yaml.Event) -> tuple[str, str] | None:
    if isinstance(event, yaml.AliasEvent):
        return f"`*{event.anchor}`: aliases are not supported", "write the value out"
    tag = getattr(event, "tag", None)
    return (f"`{tag}`: tags are not supported", "write a plain value") if tag else None


def _syntax_problem(error: yaml.MarkedYAMLError, where: Where) -> Problem:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    reason = error.problem or str(error)
    if "'\\t'" in reason:
        return Problem(where(line), "a tab is used for indentation", "YAML wants spaces")
    if "expected a single document" in str(error):
        return Problem(where(line), "a second document starts here (`---`)", "one recipe per file")
    context = f" {error.context}" if error.context else ""
    return Problem(where(line), f"not valid YAML: {reason}{context}")


def _key_problem(key: yaml.Node, path: KeyPath, where: str, first: dict[str, Any]) -> Problem | None:
    if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
        shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
        return Problem(where, f"{dotted((*path, str(shown)))}: a key must be text", "quote it")
    if key.value in first:
        line = _line(first[key.value][0])
        return Problem(where, f"{dotted((*path, key.value))}: given twice, first on line {line}", "remove one")
    return secret_problem(where, dotted((*path, key.value))) if is_secret(key.value) else None


def _value_problem(node: yaml.Node, path: KeyPath, where: str) -> Problem | None:
    if not isinstance(node, yaml.ScalarNode):
        return None
    text = node.value
    if "${" in text:
        return Problem(where, f"{dotted(path)}: `{text}`: interpolation is not supported", "write the value out")
    if node.style is not None:
        return None
    if _SWITCH.fullmatch(text):
        hint = "write true or false, or quote it if it is text"
        return Problem(where, f"{dotted(path)}: `{text}` is read as a switch by some and as text by others", hint)
    if _ODD_NUMBER.fullmatch(text):
        return Problem(where, f"{dotted(path)}: YAML reads `{text}` as another number", "quote it if it is text")
    if _NOT_FINITE.fullmatch(text):
        return Problem(where, f"{dotted(path)}: `{text}` is not a finite number")
    return None


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
