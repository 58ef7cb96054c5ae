"""Which texts of a recipe are local paths, and where they point."""

from __future__ import annotations

import os
import re
from glob import has_magic
from pathlib import Path

from align.recipe.nearest import nearest

_DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".gz", ".zst")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def locate(text: str, base: Path) -> str:
    """An absolute path if `text` is a local one (it exists in `base`, or looks like a path or a pattern of paths), else
    the text itself."""
    path = Path(os.path.normpath(base / Path(text).expanduser()))
    looks_local = text.startswith((".", "~", "/")) or text.endswith(_DATA_SUFFIXES) or has_magic(text)
    return str(path) if looks_local or (text and path.exists()) else text


def model_reason(located: str) -> tuple[str, str] | None:
    """What is wrong with the path of a model, and the hint; None for a folder or a hub id."""
    path = Path(located)
    if located and path.is_dir():  # no text at all would mean the current folder
        return None
    if path.is_absolute():
        if path.is_file():
            return f"{located} is a file", "a model is a folder with config.json and *.safetensors"
        beside = [item.name for item in path.parent.iterdir() if item.is_dir()] if path.parent.is_dir() else []
        match = nearest(path.name, beside)
        return f"{located}: no such folder", f"did you mean `{path.with_name(match)}`?" if match else ""
    if _HUB_ID.fullmatch(located):
        return None
    return f"'{located}' is neither a folder nor a hub id", "a hub id is written `organisation/name@revision`"
