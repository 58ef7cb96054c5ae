"""pydantic's errors as problems a user can act on: where it was given, the dotted key, what is wrong, the
nearest fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from align.errors import Problem
from align.recipe.nearest import did_you_mean, nearest
from align.recipe.overrides import Origins
from align.recipe.recipe_settings import RecipeSettings
from align.recipe.schema import KeyPath, fixed, model_at, nested_in
from align.recipe.settings import REFUSED, REQUIRED, Settings
from align.recipe.trainer_args import RESERVED

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_BOUND = {
    "greater_than": "over {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "under {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def explain(
    error: ValidationError, model: type[Settings], values: dict[str, Any], prefix: KeyPath, origins: Origins
) -> list[Problem]:
    """The problems of one settings object whose `values` stand at `prefix` in the recipe."""
    found: dict[KeyPath, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        path = item["loc"] if item["type"] == REFUSED else _value_path(item["loc"], values)
        found.setdefault(path, []).append(item)
    problems = []
    for path, items in found.items():
        if any(other[: len(path)] == path for other in found if other != path) and _wanted(items):
            continue  # one branch of a union; the branch that fits better is reported further in
        problems.append(origins.problem((*prefix, *path), *_reason(path, items, model, prefix)))
    return problems


def _value_path(loc: tuple[int | str, ...], values: Any) -> KeyPath:
    """pydantic's location without the names of union branches that it puts between the keys."""
    path: list[str | int] = []
    current = values
    for index, part in enumerate(loc):
        inside = isinstance(current, dict | list) and (
            part in current if isinstance(current, dict) else isinstance(part, int) and part < len(current)
        )
        if inside:
            current = current[part]  # type: ignore[index]
            path.append(part)
        elif index == len(loc) - 1 and isinstance(current, dict | list) and type(part) is _key_type(current):
            path.append(part)  # a missing key
    return tuple(path)


def _key_type(container: dict[str, Any] | list[Any]) -> type:
    return str if isinstance(container, dict) else int


def _wanted(items: list[ErrorDetails]) -> list[str]:
    return list(dict.fromkeys(_WANTED[item["type"]] for item in items if item["type"] in _WANTED))


def _reason(path: KeyPath, items: list[ErrorDetails], model: type[Settings], prefix: KeyPath) -> tuple[str, str]:
    """What is wrong, and the hint."""
    item = items[0]
    kind, context, given = item["type"], item.get("ctx", {}), item["input"]
    if kind == "extra_forbidden":
        return "no such setting", _missing_space(path, given) or _suggest(path, model, prefix)
    if kind == "missing":
        return ("a value is missing here" if isinstance(path[-1], int) else REQUIRED), ""
    if kind in ("literal_error", "enum"):
        return _choice(given, _choices(model, path), context)
    if kind == "value_error":
        return str(context["error"]), ""
    if kind == REFUSED:
        return item["msg"], ""
    if kind in _BOUND:
        return f"must be {_BOUND[kind].format(**context)}, got {given}", ""
    if _wanted(items):
        return f"expected {' or '.join(_wanted(items))}, got {_shown(given)}", _name_first(path, model)
    return f"{item['msg'][0].lower()}{item['msg'][1:]}, got {_shown(given)}", ""


def _missing_space(path: KeyPath, given: Any) -> str:
    """The hint for `{key:value}`, which to YAML is a key without a value."""
    key, colon, value = str(path[-1]).partition(":")
    return f"write `{key}: {value}`, with a space after the colon" if colon and given is None else ""


def _name_first(path: KeyPath, model: type[Settings]) -> str:
    """The hint when a setting stands where a name belongs: `reward: {url: X}` for `reward: {NAME: {url: X}}`."""
    if len(path) < 2:
        return ""
    *parents, name, key = path
    holder = model_at(model, tuple(parents))
    field = holder.model_fields.get(str(name)) if holder else None
    inner = nested_in(field) if field else None
    is_setting = inner is not None and inner.by_name and key in inner.model.model_fields
    return f"give it a name: `{name}: {{NAME: {{{key}: ...}}}}`" if is_setting else ""


def _shown(value: Any) -> str:
    """A value as YAML would show it, cut when long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _choices(model: type[Settings], path: KeyPath) -> list[str]:
    """The literals allowed at `path`, which may be an item of a list."""
    keys = [part for part in path if isinstance(part, str)]
    holder = model_at(model, tuple(keys[:-1]))
    return _literals(holder.model_fields[keys[-1]].annotation) if holder and keys[-1] in holder.model_fields else []


def _literals(annotation: Any) -> list[str]:
    arguments = get_args(annotation)
    plain = [str(argument) for argument in arguments if isinstance(argument, str | int)]
    return plain or [text for argument in arguments for text in _literals(argument)]


def _choice(given: Any, choices: list[str], context: Mapping[str, Any]) -> tuple[str, str]:
    listed = ", ".join(choices) or context.get("expected", "")
    match = nearest(str(given), choices)
    return f"{_shown(given)} is not one of {listed}", f"did you mean `{match}`?" if match else ""


def _suggest(path: KeyPath, model: type[Settings], prefix: KeyPath) -> str:
    """The setting that was meant by an unknown key: elsewhere under the same name, near it, or known from
    TRL."""
    *parents, key = (str(part) for part in path)
    if "." in key:
        return f"nest it: `{key.split('.')[0]}:` with `{key.split('.', 1)[1]}` inside"
    here = model_at(model, tuple(parents)) or model
    inside = [setting.key for setting in fixed(model)]
    elsewhere = [name for name in inside if key in (name.rsplit(".", 1)[-1], name.replace(".", "_"))]
    if elsewhere:
        return f"did you mean `{min(elsewhere, key=len)}`?"
    if prefix and key in RecipeSettings.model_fields:
        return f"`{key}` stands at the top of the recipe, beside the stages"
    if nearest(key, here.model_fields) is None:
        if RESERVED.get(key) in inside:
            return f"did you mean `{RESERVED[key]}`?"
        far = nearest(key, [name.replace(".", "_") for name in inside]) or ""
        match = next((name for name in inside if name.replace(".", "_") == far), None)
        if match:
            return f"did you mean `{match}`?"
    return did_you_mean(key, here.model_fields)
