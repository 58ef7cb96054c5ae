"""Stage kinds that take no time: real processes and files, no torch. Workers import it through PYTHONPATH.

`python -m toy_stages ARGUMENTS` is the `align` command with these kinds instead of the real ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Literal

from align.context import Context
from align.errors import NumericError
from align.job import StageResult
from align.recipe.data_settings import Data, Role
from align.recipe.settings import Settings, execution, source
from align.recipe.spec import Kind, Slot, StageSpec
from align.recipe.training_settings import LoraSettings
from align.records import committed_folder, sweep

DEADLINE = 60.0


class Config(Settings):
    """Settings of every toy kind that has a data file."""

    kind: str
    """Stage kind."""
    data: Data | None = None
    """Rows."""
    lr: float = 0.1
    """Part of what the weights are."""
    log_every: int = execution(1)
    """Changes nothing."""
    steps: int = 3
    """Steps, each with a checkpoint."""
    seed: int | None = None
    """None: the recipe's."""
    gate: str | None = execution(None)
    """Folder of files through which a test holds the stage at a point; see `reach`."""
    fail: Literal["numeric", "bug", "disk", "kill", "nan"] | None = execution(None)
    """How to end instead of well."""
    failing: int = execution(0)
    """Which process does."""


class BaseConfig(Config):
    """Makes a policy from nothing."""

    kind: Literal["base"] = "base"
    """Stage kind."""


class SftConfig(Config):
    """Policy to policy."""

    kind: Literal["sft"] = "sft"
    """Stage kind."""
    policy: str | None = source()
    """What is trained."""
    lora: LoraSettings | None = None
    """Said of what it makes; nothing else follows from it here."""


class RewardConfig(SftConfig):
    """Policy to reward model."""

    kind: Literal["reward"] = "reward"  # type: ignore[assignment]
    """Stage kind."""


class PpoConfig(SftConfig):
    """Policy and reward model to policy."""

    kind: Literal["ppo"] = "ppo"  # type: ignore[assignment]
    """Stage kind."""
    reference: str | None = source()
    """None: policy."""
    reward: str | list[str] | None = source()
    """The reward model, or several."""

    def sources(self, slot: str) -> dict[str, str | None]:
        """Several reward models are reward.1, reward.2 ..."""
        if slot == "reward" and isinstance(self.reward, list):
            return {f"reward.{number}": name for number, name in enumerate(self.reward, 1)}
        return super().sources(slot)


def _spec(config: type[Settings], output: Kind, **inputs: Slot) -> StageSpec:
    kind = config.model_fields["kind"].default
    arguments = (kind, 1, f"toy {kind}", config, output, "toy_stages:run", Role.PREFERENCES, inputs)
    return StageSpec(*arguments, distributed=kind != "ppo")


SPECS = {
    "base": _spec(BaseConfig, Kind.POLICY),
    "sft": _spec(SftConfig, Kind.POLICY, policy=Slot(Kind.POLICY, ("base",))),
    "reward": _spec(RewardConfig, Kind.REWARD, policy=Slot(Kind.POLICY, ("sft", "base"))),
    "ppo": _spec(
        PpoConfig,
        Kind.POLICY,
        policy=Slot(Kind.POLICY, ("sft", "base")),
        reference=Slot(Kind.POLICY, same_as="policy"),
        reward=Slot(Kind.REWARD, ("reward",)),
    ),
}


def run(config: Config, context: Context) -> StageResult:
    """Steps with checkpoints, then weights that are a hash of all that matters, then the commit."""
    reach(config, context, "started")
    if context.is_main:
        sweep(context.checkpoints)
    done = max((int(path.name[5:]) for path in context.checkpoints.glob("step-*")), default=0)
    _any_of(False, context)  # all have looked before the first one writes
    for step in range(done + 1, config.steps + 1):
        context.metrics.write(step, resumed_from=done)
        if context.is_main:
            with committed_folder(context.checkpoints / f"step-{step}") as folder:
                (folder / "state").write_text(str(step))
        reach(config, context, f"step-{step}")
        if _any_of(context.stop.is_set, context):
            context.stop_here(step)
    _maybe_fail(config)
    if not context.is_main:
        return StageResult({}, {})
    text = json.dumps([config.lr, config.steps, context.job.seed, _weights(context)])
    is_reward = context.job.kind == "reward"
    with context.commit_model() as folder:
        name = f"Toy{'ForSequenceClassification' if is_reward else 'ForCausalLM'}"
        (folder / "config.json").write_text(json.dumps({"architectures": [name]}))
        reach(config, context, "committing")
        (folder / "model.safetensors").write_text(hashlib.sha256(text.encode()).hexdigest())
    reach(config, context, "committed")
    score = float("nan") if config.fail == "nan" else 0.5
    metrics = {"accuracy": score} if is_reward else {"gold": score, "gold_ci95": [0.4, 0.6], "kl": 1.5}
    return StageResult(metrics, {"largest_difference": 0.0})


def _any_of(flag: bool, context: Context) -> bool:
    """Whether it is true in any process."""
    if context.processes == 1:
        return flag
    from align import ranks  # loads torch

    return ranks.any_of(flag)


def _weights(context: Context) -> list[str]:
    """What the inputs hold; `base` draws its own, from outside the fingerprint, as other hardware would."""
    folders = [Path(value.path) for value in context.job.inputs.values()]
    drawn = os.environ.get("TOY_DRAW", "")
    return [*((folder / "model.safetensors").read_text() for folder in folders), drawn]


def reach(config: Config, context: Context, point: str) -> None:
    """Says that `point` is reached, waits while there is a file `hold-<point>`, and says if told to stop."""
    if config.gate is None:
        return
    gate = Path(config.gate)
    (gate / f"reached-{config.kind}-{point}").touch()
    deadline = time.monotonic() + DEADLINE
    while (gate / f"hold-{config.kind}-{point}").exists() and time.monotonic() < deadline:
        if context.stop.is_set:
            (gate / f"reached-{config.kind}-signal").touch()
        time.sleep(0.01)


def _maybe_fail(config: Config) -> None:
    if int(os.environ.get("RANK", "0")) != config.failing:
        return
    if config.fail == "numeric":
        raise NumericError("toy: the loss is [red]nan[/red] at step 3")
    if config.fail == "bug":
        raise RuntimeError("a bug of the toy")
    if config.fail == "disk":
        raise OSError(28, "No space left on device", "somewhere")
    if config.fail == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    import toy_stages

    from align.cli import main

    module = sys.modules["align.cli.run"]
    module.load_specs = lambda: toy_stages.SPECS  # type: ignore[attr-defined]
    main()
