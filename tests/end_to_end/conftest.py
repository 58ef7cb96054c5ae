"""A tiny recipe on the demo's data, run once through the real command line and looked at by many tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY = """\
name: tiny
evaluation: {gold: "align.demo.world:gold_scores", data: heldout.jsonl, prompts: 16, max_response_tokens: 8}
base: {data: corpus.jsonl, vocabulary: 320, context: 128, hidden: 32, layers: 1, heads: 1, steps: 6, batch_size: 8}
sft: {data: demonstrations.jsonl, max_steps: 6, batch_size: 8, samples_every: 3, log_every: 2, optim: {lr: 3.0e-3}}
reward:
  data: preferences.jsonl
  max_steps: 6
  batch_size: 8
  optim: {lr: 1.0e-3}
  normalise: {samples: 32, max_response_tokens: 8}
ppo:
  data: prompts.jsonl
  rollouts: 3
  rollout: {prompts: 16, max_response_tokens: 8, engine: transformers}
  optim: {lr: 1.0e-3, eps: 1.0e-5}
dpo: {data: preferences.jsonl, max_steps: 4, batch_size: 8, optim: {lr: 1.0e-4}}
"""


class Workplace:
    """A folder with the tiny recipe, copies of the demo's data, and a way to call `align` in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.preferences = folder / "preferences.jsonl"
        (folder / "align.yaml").write_text(TINY, encoding="utf-8")
        for path in (ROOT / "configs" / "demo").glob("*.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / path.name).write_text("".join(lines[:120]), encoding="utf-8")

    def align(self, *arguments: str, expect: int = 0) -> str:
        """Calls `align`, checks its exit code and returns what it printed."""
        done = self.call(*arguments)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Calls `align` in the folder, on one thread."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, "-m", "align", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=900, check=False
        )

    def actions(self, *arguments: str) -> dict[str, tuple[str, list[str]]]:
        """What `align plan` would do with each stage, and why."""
        plan = json.loads(self.call("plan", *arguments, "--json").stdout)
        return {stage["stage"]: (stage["action"], stage["reasons"]) for stage in plan["stages"]}

    def folder_of(self, stage: str, run: str = "tiny") -> Path:
        """The folder of a stage's one attempt."""
        (found,) = (self.folder / "runs" / run / stage).glob("*/record.json")
        return found.parent

    def record(self, stage: str, run: str = "tiny") -> dict[str, Any]:
        """The record of a stage."""
        return json.loads((self.folder_of(stage, run) / "record.json").read_text(encoding="utf-8"))

    def weights(self, run: str) -> dict[str, str]:
        """sha256 of the weights of every stage."""
        stages = ("base", "sft", "reward", "ppo", "dpo")
        return {stage: self.record(stage, run)["files"]["model.safetensors"]["sha256"] for stage in stages}


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The whole chain, run."""
    workplace = Workplace(tmp_path_factory.mktemp("chain"))
    workplace.align("run", "sft", "reward", "ppo", "dpo", "track=[tensorboard]")
    return workplace
