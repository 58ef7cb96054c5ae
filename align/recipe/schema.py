"""Walking the settings classes: what may be inside what, under which dotted key, with which default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import isclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from align.recipe.settings import Settings

KeyPath = tuple[str | int, ...]
"""Where a value is: ("ppo", "optim", "betas", 1)."""


def dotted(path: KeyPath) -> str:
    """`ppo.optim.betas[1]`, as messages and overrides write it."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


@dataclass(frozen=True)
class Nested:
    """A settings class inside another, and how its shorthand (a bare path) becomes a mapping."""

    model: type[Settings]
    expand: Callable[[Any], Any]


def nested(annotation: Any, metadata: tuple[Any, ...] = ()) -> Nested | None:
    """The settings class in an annotation such as `Data | None`, or None for a plain value."""
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        metadata = (*metadata, *inner)
    if get_origin(annotation) in (Union, UnionType):
        return next(filter(None, (nested(option) for option in get_args(annotation))), None)
    if not (isclass(annotation) and issubclass(annotation, Settings)):
        return None
    before = next((item.func for item in metadata if isinstance(item, BeforeValidator)), None)
    return Nested(annotation, before or (lambda value: value))  # type: ignore[arg-type]


def nested_in(field: FieldInfo) -> Nested | None:
    """The settings class a field holds, or None."""
    return nested(field.annotation, tuple(field.metadata))


def model_at(model: type[Settings], path: KeyPath) -> type[Settings] | None:
    """The settings class found at `path` inside `model`; None where there is a plain value or nothing."""
    current: type[Settings] | None = model
    for part in path:
        field = current.model_fields.get(str(part)) if current else None
        inner = nested_in(field) if field else None
        current = inner.model if inner else None
    return current


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
        fallback = getattr(default, name) if default is not None else field.default
        fallback = fallback if isinstance(fallback, inner.model) else None
        result[name] = complete(inner.model, inner.expand(given[name]), fallback)
    return result


@dataclass(frozen=True)
class Setting:
    """One documented key: `Setting("optim.lr", FieldInfo, 3e-6)`."""

    key: str
    field: FieldInfo
    default: Any
    """What applies when the key is not given; PydanticUndefined when it must be."""


def walk(model: type[Settings], default: Any = None, prefix: str = "") -> Iterator[Setting]:
    """Every key of a settings class, those of nested classes right after the key that holds them."""
    for name, field in model.model_fields.items():
        value = getattr(default, name) if isinstance(default, model) else field.get_default(call_default_factory=True)
        yield Setting(prefix + name, field, value)
        inner = nested_in(field)
        if inner is not None:
            yield from walk(inner.model, value, f"{prefix}{name}.")
