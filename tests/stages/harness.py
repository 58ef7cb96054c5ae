"""Runs a whole stage in this process, on a tiny model and a handful of rows, and can stop it at a step."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align import ranks
from align.context import Context, StopFlag
from align.job import Input, Job, StageResult
from align.metrics import MetricsLog
from align.recipe.training_settings import TrainingSettings
from tests.models.tiny import demo_texts, model_input

STEPS = 6
OPTIM = {"lr": 1e-2, "schedule": "cosine", "warmup": 0.3}  # warm-up and decay: resuming has a place to be lost
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "batch_size": 4,
    "max_length": 64,
    "log_every": 1,
    "checkpoint": {"every_steps": 2},
    "optim": OPTIM,
}
BASE: dict[str, Any] = {
    "steps": STEPS,
    "log_every": 1,
    "batch_size": 4,
    "vocabulary": 280,
    "hidden": 32,
    "layers": 2,
    "heads": 2,
    "sequence_length": 32,
    "optim": OPTIM,
}
"""A small model from nothing."""
KINDS: dict[str, dict[str, Any]] = {
    "sft": COMMON,
    "dpo": COMMON,
    "kto": COMMON,
    "reward": COMMON | {"normalise": {"samples": 32, "max_response_tokens": 8}},
}
LORA: dict[str, Any] = {"lora": {"rank": 4, "alpha": 8}}


def write_data(folder: Path) -> dict[str, str]:
    """Demonstrations and preferences of the demo world; the data file of each kind of stage."""
    rows = demo_texts(24, seed=3)
    demonstrations, preferences = folder / "demonstrations.jsonl", folder / "preferences.jsonl"
    demonstrations.write_text("".join(json.dumps({"prompt": p, "response": a}) + "\n" for p, a in rows))
    preferences.write_text(
        "".join(json.dumps({"prompt": p, "chosen": "sure , " + a, "rejected": "ugh , " + a}) + "\n" for p, a in rows)
    )
    return dict.fromkeys(("base", "sft"), str(demonstrations)) | dict.fromkeys(
        ("dpo", "kto", "reward"), str(preferences)
    )


def new_context(
    kind: str,
    directory: Path,
    inputs: dict[str, Input],
    settings: dict[str, Any],
    seed: int = 0,
    evaluation: dict[str, Any] | None = None,
) -> Context:
    """What this process of a stage is given, in a folder of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    job = Job(
        stage=kind,
        kind=kind,
        version=1,
        fingerprint="0" * 64,
        seed=seed,
        directory=str(directory),
        config=settings,
        inputs=inputs,
        evaluation={"prompts": 4, "max_response_tokens": 6, **(evaluation or {})},
        track=[],
        identity={},
    )
    return Context(job, StopFlag(), process=ranks.rank(), processes=ranks.size())


@dataclass(frozen=True)
class Run:
    """A stage that can be run in its folder, as often as a test wants to."""

    kind: str
    directory: Path
    policy: Input
    settings: dict[str, Any]
    seed: int = 0
    evaluation: dict[str, Any] = field(default_factory=dict)

    def config(self) -> TrainingSettings:
        return importlib.import_module(f"stages.{self.kind}.config").Config.model_validate(self.settings)

    def context(self) -> Context:
        inputs = {"policy": self.policy}
        return new_context(self.kind, self.directory, inputs, self.settings, self.seed, self.evaluation)

    def __call__(self, at_step: Callable[[Context, int], None] | None = None) -> StageResult:
        """Runs the stage; `at_step` is called when the metrics of a step are written."""
        context = self.context()
        if at_step:
            context.metrics = Watched(context, at_step)
        return importlib.import_module(f"stages.{self.kind}.run").run(self.config(), context)

    def at(self, directory: Path, **changes: Any) -> Run:
        """The same run in another folder."""
        return replace(self, directory=directory, **changes)

    @property
    def model(self) -> Path:
        return self.directory / "model"

    def output(self) -> Input:
        """What the stage made, as the next stage's input."""
        return model_input(self.model, "reward" if self.kind == "reward" else "policy", source=self.kind)

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl without the clock."""
        rows = MetricsLog(self.directory / "metrics.jsonl").read()
        return [{key: value for key, value in row.items() if key not in {"time", "step_time"}} for row in rows]


class Watched(MetricsLog):
    """metrics.jsonl with a person beside it who may press Ctrl-C at a step."""

    def __init__(self, context: Context, at_step: Callable[[Context, int], None]):
        super().__init__(context.metrics.path, writes=context.metrics.writes)
        self.context, self.at_step = context, at_step

    def write(self, step: int, **values: Any) -> None:
        super().write(step, **values)
        self.at_step(self.context, step)


def stop_after(step: int) -> Callable[[Context, int], None]:
    """Asks the stage to stop once `step` is logged: it finishes the next step and saves."""

    def at_step(context: Context, now: int) -> None:
        context.stop.is_set = context.stop.is_set or now >= step

    return at_step


def weights_hash(model: Path) -> str:
    """sha256 of a saved model's weights."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
