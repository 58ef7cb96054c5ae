"""What settings are made of. The docstring under each field is its documentation (`align show STAGE`).

Fields marked `execution` cannot change the result (logging cadence, number of checkpoints kept); they are
left out of a stage's fingerprint, so changing one never re-runs anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

REFUSED = "refused"
"""Type of the errors of `refuse`."""

REQUIRED = "required, and not given"


class Settings(BaseModel):
    """Base of every settings class: frozen, no unknown keys, no NaN, docstrings are the documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    def sources(self, slot: str) -> dict[str, str | None]:
        """Inputs of a slot by name, and what the recipe says each comes from; None where it says nothing. A slot is
        one input of its own name, unless a stage takes several (PPO's reward)."""
        return {slot: getattr(self, slot, None)}

    def process_problems(self, processes: int) -> dict[str, str]:
        """What is wrong with these settings on so many processes, by dotted key."""
        return {}

    def zero_problems(self, stage: int) -> dict[str, str]:
        """What is wrong with these settings under a stage of DeepSpeed's ZeRO, by dotted key."""
        return {}

    def fsdp_problems(self, offloads: bool) -> dict[str, str]:
        """What is wrong with these settings under FSDP, which may move shares to main memory, by dotted key."""
        return {}


def execution(default: Any, *, file: bool = False, **constraints: Any) -> Any:
    """A field that cannot change the result: left out of the fingerprint. `file`: it is a local path."""
    return Field(default, json_schema_extra={"execution": True, "file": file}, **constraints)


def source(default: Any = None) -> Any:
    """A field that names a model: what identifies it in the fingerprint is the model, not the name."""
    return Field(default, json_schema_extra={"source": True})


def function(default: Any = None) -> Any:
    """A field that names a Python function, `module:function`: the fingerprint holds the hash of its source."""
    return Field(default, json_schema_extra={"function": True})


def is_marked(field: FieldInfo, mark: str) -> bool:
    """Whether a field was made by the function called `mark` (execution, source or function), or names a `file`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))


def refuse(problems: Mapping[str, str]) -> None:
    """For validators of settings that must go together: raises what is wrong by dotted key, so that each problem is
    told with its own key and line. Does nothing when there is none.
    """
    if problems:
        errors = [
            InitErrorDetails(
                type=PydanticCustomError(REFUSED, "{what}", {"what": what}), loc=tuple(key.split(".")), input=None
            )
            for key, what in problems.items()
        ]
        raise ValidationError.from_exception_data("settings", errors)


def shorthand(key: str) -> BeforeValidator:
    """Lets a bare string (or list) stand for a mapping: `data: a.jsonl` is `data: {path: a.jsonl}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str | list) else value)


Fraction = Annotated[float, Field(ge=0, le=1)]
