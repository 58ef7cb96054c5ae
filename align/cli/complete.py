"""Completion of what `align run` takes: stage names, dotted keys, and values where there are few."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo


def complete_run_argument(incomplete: str) -> list[str]:
    """Stage names and `dotted.key=` that start with what is typed; after `=`, the values of a choice."""
    from align.recipe.recipe_settings import RecipeSettings
    from align.recipe.schema import fixed

    key, equals, _ = incomplete.partition("=")
    stage, dot, _ = key.partition(".")
    kinds = _stages()
    model, prefix = (kinds[stage], f"{stage}.") if dot and stage in kinds else (RecipeSettings, "")
    fields = {prefix + setting.key: setting.field for setting in fixed(model)}
    if equals:
        options = [f"{key}={value}" for value in _values(fields[key])] if key in fields else []
    else:
        options = [*([] if dot else kinds), *(f"{name}=" for name in fields)]
    return [option for option in options if option.startswith(incomplete)]


def _stages() -> dict[str, Any]:
    """Settings class by stage name: every kind, and the stages of the recipe in this folder as far as it can
    be read."""
    from align.errors import AlignError
    from align.recipe.document import read_document
    from align.recipe.shipped import HERE
    from stages import load_specs

    kinds = {kind: spec.config for kind, spec in load_specs().items()}
    try:
        values = read_document(Path(HERE), HERE).values if Path(HERE).is_file() else {}
    except AlignError:  # it will be reported when it is run
        values = {}
    own = {
        name: kinds[value["kind"]]
        for name, value in values.items()
        if isinstance(value, dict) and value.get("kind") in list(kinds)
    }
    return {**kinds, **own}


def _values(field: FieldInfo) -> list[str]:
    if field.annotation is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(field.annotation) if isinstance(value, str)]
