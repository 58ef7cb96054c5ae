"""YAML that a person reviews: dumped, never put together from text, with scripts as blocks."""

from __future__ import annotations

import math
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Keeps scripts readable; whatever a block cannot hold is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        """Equal parts are written out: a reader should not have to look them up."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(*documents: Any) -> str:
    """The documents as YAML, in the order of their keys. Every text is read back as the same text."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=math.inf, explicit_start=len(documents) > 1)
