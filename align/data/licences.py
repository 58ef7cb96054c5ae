"""The licences that a data card may name: the identifiers of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.recipe.nearest import nearest

OTHER = "other"
KNOWN = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "lppl-1.3c",
        "ms-pl",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "ofl-1.1",
        "osl-3.0",
        "postgresql",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "gemma",
        "unknown",
        "other",
    ]
)


def licence_fault(front: Mapping[str, Any]) -> str | None:
    """What is wrong with the licence in the front matter of a card, and the nearest fix; None when nothing is."""
    named = front.get("license")
    if named not in KNOWN:
        near = nearest(str(named), sorted(KNOWN))
        hint = f"did you mean `{near}`?" if near else f"write `{OTHER}`, and name it in license_name"
        return f"`license` {named} is not a licence that the Hub knows ({hint})"
    missing = [name for name in ("license_name", "license_link") if not front.get(name)]
    if named == OTHER and missing:
        return f"`license` is {OTHER}, so {' and '.join(f'`{name}`' for name in missing)} must say which"
    return None
