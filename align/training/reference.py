"""The reference's log-probabilities on disk: computed once for all stages of a run that ask for the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.records import canonical_json, committed_file, fingerprint

FOLDER = "reference"
"""Beside the folders of a run's stages."""
SCHEMA = 1
DECIDING = ("torch", "transformers", "trl")
"""Packages that compute them."""


def reference_key(weights: str, config: Any, rows: Iterable[Any], columns: Sequence[str], precision: str) -> str:
    """What the log-probabilities of `rows` depend on, as one hash: the hash of the reference's weights, its
    configuration, the token ids of the columns row by row, in order, the forward pass's precision, and versions."""
    tokens = hashlib.sha256()
    for row in rows:
        tokens.update(canonical_json([row[name] for name in columns]).encode())
    architecture = json.loads(config.to_json_string(use_diff=False))
    architecture.pop("_name_or_path", None)  # where it lies
    return fingerprint(
        {
            "schema": SCHEMA,
            "weights": weights,
            "config": architecture,
            "tokens": tokens.hexdigest(),
            "precision": precision,
            "versions": {name: version(name) for name in DECIDING},
        }
    )


def write_logprobs(path: Path, values: Tensor) -> None:
    """Writes the log-probabilities (N,2) of N rows, whole or not at all."""
    values = values.contiguous()
    with committed_file(path) as temporary:
        save_file({"logprobs": values}, temporary, metadata={"sha256": _sha256(values)})


def read_logprobs(path: Path) -> Tensor | None:
    """What `write_logprobs` wrote; None when it is not there or not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            values, written = file.get_tensor("logprobs"), file.metadata()["sha256"]
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    return values if _sha256(values) == written else None


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
