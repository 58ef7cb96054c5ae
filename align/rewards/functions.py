"""Reward functions: the user's own Python, named `module:function` in the recipe. Torch-free."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from traceback import extract_tb
from types import UnionType
from typing import Any, get_origin, get_type_hints

from align.errors import ConfigError, Problem
from align.recipe.nearest import did_you_mean
from align.rewards.batch import RewardBatch, RewardFunction, Values, checked

SIGNATURE = "wanted def function(batch: RewardBatch) -> list[float]"
USERS_FAULTS = (Exception, SystemExit)
"""What the user's code may raise. A script that ends with sys.exit() must not end the run as if it were done."""


def load_function(name: str, where: str) -> RewardFunction:
    """The reward function that the recipe calls `name` at `where`.

    Raises ConfigError when it cannot be imported, cannot be called with one RewardBatch, or says by its annotations
    that it does something else.
    """
    function = imported(name, where)
    _check_signature(function, name, where)
    return function


def imported(name: str, where: str) -> Any:
    """What the recipe calls `module:function` at `where`; the current folder counts, and comes first. Raises
    ConfigError."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(Problem(where, f"{name!r} is not the name of a function", "wanted module:function"))
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except USERS_FAULTS as error:
        places = "it is looked for in the current folder and among the installed packages"
        hint = places if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(Problem(where, f"cannot import {name!r}: {_one_line(error)}", hint)) from error
    function = getattr(module, attribute, None)
    if function is None:
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(Problem(where, f"{module_name} has no function {attribute!r}", did_you_mean(attribute, own)))
    return function


def call_function(function: RewardFunction, batch: RewardBatch, where: str) -> Values:
    """What the function says of the batch, checked. Raises ConfigError for whatever it raises, naming the line."""
    try:
        given = function(batch)
    except USERS_FAULTS as error:
        raise ConfigError(Problem(where, f"{_name(function)} raised {_one_line(error)}{_line(error)}")) from error
    return checked(given, batch, f"{where}: {_name(function)}")


def _check_signature(function: Any, name: str, where: str) -> None:
    if not callable(function):
        what = f"is not callable: it is of type {type(function).__name__}"
    elif inspect.iscoroutinefunction(function):
        what = "is async"
    elif not _takes_one_argument(function):
        what = f"cannot be called with one argument: it is {name.partition(':')[2]}{inspect.signature(function)}"
    else:
        what = _wrong_annotation(function)
    if what:
        raise ConfigError(Problem(where, f"{name} {what}", SIGNATURE))


def _takes_one_argument(function: Any) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C do not say
        return True
    return True


def _wrong_annotation(function: Any) -> str:
    """What the annotations promise that a reward function does not do; "" when they fit or say nothing."""
    if not inspect.isfunction(function):
        return ""
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names that are imported for the type checker only
        return ""
    given, returned = (hints.get(name, Any) for name in (next(iter(inspect.signature(function).parameters)), "return"))
    taken, made = _class(given), _class(returned)
    if taken is not None and not issubclass(RewardBatch, taken):
        return f"takes {_type(given)}"
    if made is not None and (not issubclass(made, Iterable) or issubclass(made, str | bytes | Mapping)):
        return f"returns {_type(returned)}"
    return ""


def _class(hint: Any) -> type | None:
    """The class behind a hint: that of list[float] is list. None for Any, unions and the like."""
    kind = get_origin(hint) or hint
    return kind if isinstance(kind, type) and kind not in (Any, UnionType) else None


def _type(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _one_line(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line(error: BaseException) -> str:
    """` at file.py:12`: the innermost line of the file that holds the function. "" when there is none in Python."""
    frames = extract_tb(error.__traceback__)[1:]  # the first is our call
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
