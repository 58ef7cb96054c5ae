"""Runs stages through the command line and reads what they left, for the benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curves import Estimate

ALIGN = [sys.executable, "-m", "align"]


@dataclass(frozen=True)
class Finished:
    """A stage that ran, now or at an earlier call."""

    folder: Path
    models: list[str]
    """The models that were in memory, as the plan says it."""

    @property
    def record(self) -> dict[str, Any]:
        """Its record.json."""
        return json.loads((self.folder / "record.json").read_text(encoding="utf-8"))

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        """Its metrics.jsonl."""
        return _lines(self.folder / "metrics.jsonl")

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Its answers to the held-out prompts, each with its gold score."""
        return [row for row in _lines(self.folder / "samples.jsonl") if row["at"] == "final"]

    def measure(self, name: str) -> Estimate:
        """A final metric with its interval."""
        metrics = self.record["metrics"]
        low, high = metrics[f"{name}_ci95"]
        return Estimate(metrics[name], (high - low) / 2)


def run(
    stages: Sequence[str],
    settings: Mapping[str, Any],
    *,
    recipe: str,
    name: str,
    runs: str = "runs",
    force: Sequence[str] = (),
) -> dict[str, Finished]:
    """Runs stages and those they need, reusing what is up to date except those of `force`; returns all by name."""
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    arguments = [*stages, *changes, "-c", recipe, "--run", name, "--runs", runs]
    again = [f"--force={stage}" for stage in force]
    subprocess.run([*ALIGN, "run", *arguments, *again], check=True)
    plan = subprocess.run([*ALIGN, "plan", *arguments, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return {
        step["stage"]: Finished(Path(step["directory"]), step["models"]) for step in json.loads(plan.stdout)["stages"]
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
