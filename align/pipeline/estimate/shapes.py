"""What is counted in another process (align.shapes), because it needs the libraries, and remembered by its question."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from align.errors import WriteError
from align.recipe.training_settings import LoraSettings
from align.records import fingerprint, write_json

NF4_BYTES = 0.5 + 4 / 64
"""Of a weight in NF4: 4 bits, and a float32 for each block of 64 (align.models.quantised)."""


@dataclass(frozen=True)
class Shapes:
    """The sizes of a causal language model, counted on the meta device."""

    parameters: int
    """All numbers; a head tied to the embedding counts once."""
    embedding: int
    head: int
    """Numbers of an output head of its own; 0 where it is the embedding."""
    linears: list[tuple[str, int, int]]
    """Name, features in and features out of every linear layer of the backbone."""
    largest: int
    """Numbers of the largest parameter."""
    hidden: int
    layers: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together, which is that of the values."""
    heads: int
    vocabulary: int
    context: int | None
    """Longest sequence the model is made for."""
    norms: int
    """Numbers of one token that all norms work on, the sum of their widths."""
    native_norm: bool
    """Whether norms are torch's LayerNorm and not an RMSNorm written out in Python."""
    activation_copies: int
    """Tensors that an activation without a gate keeps: more than one where it is written out in Python."""

    @classmethod
    def read(cls, answer: Mapping[str, Any]) -> Shapes:
        """From the answer of align.shapes."""
        return cls(**{**answer, "linears": [tuple(one) for one in answer["linears"]]})

    @property
    def backbone(self) -> int:
        """Numbers of the model without a head: what a reward model and a critic have, but for one row."""
        return self.parameters - self.head

    @property
    def feed_forward(self) -> int:
        """Width between the two layers of a feed-forward: what the last linear layer of a block reads."""
        return self.linears[-1][1]

    @property
    def is_gated(self) -> bool:
        """Whether a feed-forward has a gate: what its first layers give is twice as wide as what its last one reads."""
        first = sum(outer for *_, outer in self.linears) / self.layers - 2 * self.hidden - self.queries - 2 * self.keys
        return first > 1.5 * self.feed_forward

    @property
    def quantisable(self) -> int:
        """Weights of the linear layers of the backbone: what NF4 holds in 4 bits."""
        return sum(inner * outer for _, inner, outer in self.linears)

    def adapted(self, lora: LoraSettings) -> list[tuple[str, int, int]]:
        """The linear layers that get an adapter, by peft's rules: all of them, those whose name ends so, or those whose
        name a pattern matches."""
        wanted = lora.target_modules
        if wanted == "all-linear":
            return self.linears
        if isinstance(wanted, str):
            return [one for one in self.linears if re.fullmatch(wanted, one[0])]
        return [one for one in self.linears if any(f".{one[0]}".endswith(f".{name}") for name in wanted)]

    def adapter(self, lora: LoraSettings) -> int:
        """Numbers of an adapter: A is (rank, in) and B is (out, rank) (Hu et al. 2021)."""
        return sum(lora.rank * (inner + outer) for _, inner, outer in self.adapted(lora))

    def frozen_bytes(self, size: float, quantise: str | None, parameters: int) -> float:
        """Bytes of `parameters` frozen numbers of this model in `size` bytes each, or in NF4 where that is possible."""
        packed = self.quantisable if quantise else 0
        return packed * NF4_BYTES + (parameters - packed) * size


class Counter:
    """Asks align.shapes, and remembers the answers beside the runs. To be closed."""

    def __init__(self, runs: Path):
        self.path = runs / ".shapes.json"
        self._process: subprocess.Popen[str] | None = None
        try:
            self._answers: dict[str, Any] = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._answers = {}

    def shapes(self, config: Mapping[str, Any]) -> Shapes | None:
        """Of the model of a config.json; None where the library cannot build it."""
        answer = self._ask({"config": dict(config)}, [dict(config), version("transformers")])
        return Shapes.read(answer) if answer else None

    def lengths(
        self, folder: str, trust_remote_code: bool, data: dict[str, Any], role: str, identity: Any
    ) -> list[list[int]]:
        """Tokens of each part of a sample of rows (align.shapes.row_lengths), those of the tokenizer and rows that
        `identity` stands for. Empty where they cannot be counted."""
        question = {"folder": folder, "trust_remote_code": trust_remote_code, "data": data, "role": role}
        return self._ask(question, [identity, role]) or []

    def close(self) -> None:
        """Ends the other process."""
        if self._process is not None:
            self._process.communicate()

    def _ask(self, question: dict[str, Any], identity: Any) -> Any:
        key = fingerprint(identity)
        if key not in self._answers:
            answer = self._answer(question)
            if answer is None:
                return None
            self._answers[key] = answer
            if self.path.parent.is_dir():
                with suppress(WriteError):  # a folder that may only be read can still be planned in
                    write_json(self.path, self._answers)
        return self._answers[key]

    def _answer(self, question: dict[str, Any]) -> Any:
        if self._process is None:
            command = [sys.executable, "-m", "align.shapes"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        return json.loads(line) if line else None
