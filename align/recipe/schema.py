"""Walking the settings classes: what may be inside what, under which dotted key, with which default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from inspect import isclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from align.recipe.settings import Settings

KeyPath = tuple[str | int, ...]
"""Where a value is: ("ppo", "optim", "betas", 1)."""

ANY = "<name>"
"""Stands in a dotted key for a name that the recipe chooses."""


def dotted(path: KeyPath) -> str:
    """`ppo.optim.betas[1]`, as messages and overrides write it."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


@dataclass(frozen=True)
class Nested:
    """A settings class inside another, and how its shorthand (a bare path) becomes a mapping."""

    model: type[Settings]
    expand: Callable[[Any], Any]
    by_name: bool = False
    """Whether there are any number of them, under names that the recipe chooses: `dict[str, RewardTerm]`."""
    expand_each: Callable[[Any], Any] = lambda value: value
    """How the shorthand of one of them becomes a mapping."""


def nested(annotation: Any, metadata: tuple[Any, ...] = ()) -> Nested | None:
    """The settings class in an annotation such as `Data | None`, or None for a plain value."""
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        metadata = (*metadata, *inner)
    if get_origin(annotation) in (Union, UnionType):
        return next(filter(None, (nested(option) for option in get_args(annotation))), None)
    before = next((item.func for item in metadata if isinstance(item, BeforeValidator)), lambda value: value)
    if get_origin(annotation) is dict:
        inner = nested(get_args(annotation)[1])
        return replace(inner, expand=before, by_name=True, expand_each=inner.expand) if inner else None
    if not (isclass(annotation) and issubclass(annotation, Settings)):
        return None
    return Nested(annotation, before)  # type: ignore[arg-type]


def nested_in(field: FieldInfo) -> Nested | None:
    """The settings class a field holds, or None."""
    return nested(field.annotation, tuple(field.metadata))


def model_at(model: type[Settings], path: KeyPath) -> type[Settings] | None:
    """The settings class found at `path` inside `model`; None where there is a plain value or nothing."""
    if not path:
        return model
    field = model.model_fields.get(str(path[0]))
    inner = nested_in(field) if field else None
    if inner is None or (inner.by_name and len(path) == 1):
        return None
    return model_at(inner.model, path[2 if inner.by_name else 1 :])


def places(model: type[Settings], values: Any, path: KeyPath = ()) -> Iterator[tuple[type[Settings], dict, KeyPath]]:
    """Every mapping of completed `values` that is to become settings: their class, the mapping itself, its path."""
    if not isinstance(values, dict):
        return
    yield model, values, path
    for name in values.keys() & model.model_fields.keys():
        inner = nested_in(model.model_fields[name])
        if inner is None:
            continue
        here = (*path, name)
        if not inner.by_name:
            yield from places(inner.model, values[name], here)
        elif isinstance(values[name], dict):
            for key, value in values[name].items():
                yield from places(inner.model, value, (*here, key))


def complete(model: type[Settings], given: Any, default: Settings | None = None) -> Any:
    """What was given, over the defaults of where it stands: `ppo.optim: {eps: 1e-8}` keeps PPO's own
    `optim.lr`.

    Only settings that are inside another need this: their defaults depend on the stage. Shorthands become
    mappings; what is not in the schema is passed through, for the validation to name.
    """
    if not isinstance(given, dict):
        return given
    inherited = default.model_dump(mode="json") if default is not None else {}
    result = {**inherited, **given}
    for name in given.keys() & model.model_fields.keys():
        field = model.model_fields[name]
        inner = nested_in(field)
        if inner is None:
            continue
        value = inner.expand(given[name])
        if inner.by_name:
            items = value.items() if isinstance(value, dict) else ()
            each = {key: complete(inner.model, inner.expand_each(item)) for key, item in items}
            result[name] = each if isinstance(value, dict) else value
            continue
        fallback = getattr(default, name) if default is not None else field.default
        fallback = fallback if isinstance(fallback, inner.model) else None
        result[name] = complete(inner.model, value, fallback)
    return result


@dataclass(frozen=True)
class Setting:
    """One documented key: `Setting("optim.lr", FieldInfo, 3e-6)`."""

    key: str
    field: FieldInfo
    default: Any
    """What applies when the key is not given; PydanticUndefined when it must be."""


def walk(model: type[Settings], default: Any = None, prefix: str = "") -> Iterator[Setting]:
    """Every key of a settings class, those of nested classes right after the key that holds them, `reward.<name>.url`
    where the recipe chooses a name."""
    for name, field in model.model_fields.items():
        value = getattr(default, name) if isinstance(default, model) else field.get_default(call_default_factory=True)
        yield Setting(prefix + name, field, value)
        inner = nested_in(field)
        if inner is not None:
            yield from walk(inner.model, value, f"{prefix}{name}.{ANY}." if inner.by_name else f"{prefix}{name}.")


def fixed(model: type[Settings]) -> Iterator[Setting]:
    """Of these keys, those that can be written as they are."""
    return (setting for setting in walk(model) if ANY not in setting.key)
