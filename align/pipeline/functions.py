"""Functions that a recipe names, `module:function`: found and checked in their source, without running any of it."""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from align.errors import ConfigError, Problem
from align.recipe.nearest import did_you_mean
from align.records import sha256_file


def source_hash(function: str, where: str) -> str:
    """sha256 of the module that `function` is in. Raises ConfigError, about `where`, if it is not there."""
    module, colon, name = function.partition(":")
    if not colon or not name.isidentifier():
        raise ConfigError(Problem(where, f"{function!r} does not name a function", "write `module:function`"))
    file = module_file(module, where)
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise ConfigError(Problem(where, f"{file}:{error.lineno}: not Python: {error.msg}")) from None
    if not {name, "*", "__getattr__"} & names(tree):
        functions = sorted(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
        raise ConfigError(Problem(where, f"no function {name!r} in {file}", did_you_mean(name, functions)))
    return sha256_file(file)


def names(tree: ast.Module) -> set[str]:
    """All names that a module could give: `*` stands for those of another module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return found


def module_file(name: str, where: str) -> Path:
    """The source file of a dotted module, without importing it. The current folder counts, as in a worker."""
    top, *rest = name.split(".")
    spec = PathFinder.find_spec(top, [str(Path.cwd())]) or importlib.util.find_spec(top)
    folders = [str(Path.cwd()), *sys.path]
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            break
        if spec.origin is None:  # a folder without __init__.py; what the spec says needs its parent to be imported
            folders = [str(Path(folder) / spec.name) for folder in folders]
        else:
            folders = list(spec.submodule_search_locations)
        spec = PathFinder.find_spec(part, folders)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        places = "the current folder or among the installed packages"
        raise ConfigError(Problem(where, f"no module {name!r}", f"it is looked for in {places}"))
    return Path(spec.origin)
