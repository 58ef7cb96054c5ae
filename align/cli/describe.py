"""Types and defaults of settings in words, for `align show`."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic_core import PydanticUndefined

_WORDS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    NoneType: "null",
    Any: "any value",
}
_BOUNDS = {
    annotated_types.Gt: ("over", "gt"),
    annotated_types.Ge: ("at least", "ge"),
    annotated_types.Lt: ("under", "lt"),
    annotated_types.Le: ("at most", "le"),
}


def type_text(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """`whole number, over 0, or null`."""
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        metadata = (*metadata, *inner)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(type_text(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is list:
        return f"list of ({type_text(arguments[0])})"
    if origin is tuple:
        return f"list of {len(arguments)} ({type_text(arguments[0])})"
    if origin is dict:
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    word = _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return ", ".join([word, *_bounds(metadata)])


def default_text(value: Any, nested: bool) -> str:
    """A default as it would be written in a recipe; empty where the keys inside have their own."""
    if value is PydanticUndefined:
        return "(required)"
    if nested and value is not None:
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _bounds(metadata: tuple[Any, ...]) -> list[str]:
    """The limits among the metadata of an annotation; pydantic's FieldInfo carries them in a list of its
    own."""
    limits = [limit for item in metadata for limit in (getattr(item, "metadata", None) or [item])]
    return [
        f"{word} {getattr(limit, name):g}"
        for limit in limits
        for kind, (word, name) in _BOUNDS.items()
        if isinstance(limit, kind)
    ]
