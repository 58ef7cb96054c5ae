"""Everything that is estimated of one stage, from its settings and the configs of its models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from align.data.load import load
from align.job import Input, Job
from align.pipeline.estimate.memory import CPU, Device, Memory, memory, narrow_numbers, trained_numbers
from align.pipeline.estimate.shapes import Counter, Shapes
from align.pipeline.estimate.strategies import STRATEGIES, checkpoint_bytes, chosen
from align.pipeline.estimate.workload import Lengths, Workload
from align.pipeline.graph import Node
from align.pipeline.plan import Plan
from align.recipe.spec import named
from align.recipe.training_settings import LoraSettings

MARGIN = 0.85
"""Share of a device that an estimate may fill for `gradient_checkpointing: auto` to leave it at none: estimates are up
to 15% too low (docs/memory_estimate.md)."""
METHODS = ("full", "lora", "qlora")
MADE = "policy"
"""What the model of a stage that makes one from nothing is called in its workload."""
WITHOUT_NF4 = ("zero3", "zero3-offload", "zero3-nvme", "fsdp")
"""Strategies that divide weights, which 4-bit ones cannot be."""


@dataclass(frozen=True)
class Estimate:
    """What a stage needs."""

    stage: str
    processes: int
    strategy: str
    parameters: int
    """Of the model that is trained."""
    trained: int
    work: Workload
    memory: Memory
    checkpoint: int
    """Bytes of one checkpoint."""
    artifact: int
    """Bytes of the stage's model."""

    def as_json(self) -> dict[str, Any]:
        """As plain JSON; bytes, and null for what is unknown."""
        found = self.memory
        return {
            "processes": self.processes,
            "strategy": self.strategy,
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "steps": self.work.num_steps,
            "tokens": self.work.tokens,
            "peak": round(found.peak),
            "phase": found.phase,
            "parts": _rounded(found.parts),
            "phases": {phase: _rounded(parts) for phase, parts in found.phases.items()},
            "models": _rounded(found.models),
            "host": round(found.host),
            "disk": round(found.disk),
            "checkpoint": self.checkpoint,
            "checkpoints_kept": self.work.checkpoints,
            "artifact": self.artifact,
        }


def _rounded(sizes: Mapping[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in sizes.items()}


@dataclass(frozen=True)
class Known:
    """A stage, and what was counted for it."""

    stage: str
    config: Any
    inputs: Mapping[str, Input]
    shapes: Mapping[str, Shapes]
    lengths: Lengths
    evaluation: Mapping[str, Any]
    workload: str
    """Name of the function that says what the stage does with memory."""
    launch: Mapping[str, Any] | None = None
    """How its processes are started; None: it has one."""

    def estimate(
        self, device: Device = CPU, *, config: Any = None, strategy: str | None = None, processes: int | None = None
    ) -> Estimate:
        """With other settings, strategy or number of processes than its own, if given."""
        config = self.config if config is None else config
        if getattr(config, "gradient_checkpointing", None) == "auto":
            one = with_gradient_checkpointing(config, "none")
            without = self.estimate(device, config=one, strategy=strategy, processes=processes)
            fits = device.memory is None or without.memory.peak <= MARGIN * device.memory
            config = one if fits else with_gradient_checkpointing(config, "full")
        own_processes, own_strategy = chosen(self.launch)
        strategy, processes = strategy or own_strategy, processes or own_processes
        work: Workload = named(self.workload)(config, self.inputs, self.lengths, processes, self.evaluation)
        compute = _compute(config, device)
        found = memory(work, self.shapes, strategy=strategy, processes=processes, device=device, compute=compute)
        trained = {model.role: trained_numbers(model, self.shapes[model.source]) for model in work.models}
        narrow = sum(narrow_numbers(model, self.shapes[model.source]) for model in work.models)
        first = work.models[0]
        shapes = self.shapes[first.source]
        parameters = shapes.parameters if first.has_head else shapes.backbone + shapes.hidden
        adapter = trained[first.role] if first.lora else 0
        return Estimate(
            self.stage,
            processes,
            strategy,
            parameters,
            trained[first.role],
            work,
            found,
            checkpoint=checkpoint_bytes(STRATEGIES[strategy], sum(trained.values()), compute, narrow),
            artifact=4 * (parameters + adapter),
        )

    def with_method(self, method: str) -> Any:
        """The stage's settings, with all weights trained, an adapter, or an adapter on a base in 4 bits."""
        if method == "full" and not hasattr(self.config, "lora"):
            return self.config
        lora = self.config.lora or LoraSettings()
        changed = {
            "full": None,
            "lora": lora.model_copy(update={"quantise": None}),
            "qlora": lora.model_copy(update={"quantise": "nf4"}),
        }[method]
        update: dict[str, Any] = {"lora": changed}
        critic = getattr(self.config, "critic", None)
        if changed is None and critic is not None and critic.kind == "adapter":
            update["critic"] = critic.model_copy(update={"kind": "auto"})
        return self.config.model_copy(update=update)

    def table(self, device: Device) -> dict[str, dict[str, Estimate | None]]:
        """By strategy, then by method; None for what cannot be."""
        methods = METHODS if hasattr(self.config, "lora") else METHODS[:1]
        return {
            strategy: {
                method: None
                if method not in methods or (method == "qlora" and strategy in WITHOUT_NF4)
                else self.estimate(
                    device,
                    config=self.with_method(method),
                    strategy=strategy,
                    processes=device.count if STRATEGIES[strategy].several else 1,
                )
                for method in METHODS
            }
            for strategy in STRATEGIES
        }


def with_gradient_checkpointing(config: Any, how: str) -> Any:
    """The settings of a stage with another `gradient_checkpointing`."""
    return config.model_copy(update={"gradient_checkpointing": how})


def _compute(config: Any, device: Device) -> int:
    """Bytes of a number in the passes."""
    precision = getattr(config, "precision", "float32")
    return 2 if precision in {"bfloat16", "float16"} or (precision == "auto" and device.is_gpu) else 4


class Estimator:
    """Gathers what estimates need: the config.json of each model, or the stage that will make it, and row lengths."""

    def __init__(self, runs: Path):
        self.counter = Counter(runs)
        self._configs: dict[str, dict[str, Any] | None] = {}
        """By the name of the stage that gives the model."""

    def __enter__(self) -> Estimator:
        return self

    def __exit__(self, *_: object) -> None:
        self.counter.close()

    def follow(self, node: Node, job: Job) -> None:
        """Notes the config.json of what a stage makes. Stages have to come in the order of the plan."""
        if isinstance(node.config, Makes):
            self._configs[job.stage] = node.config.architecture()
        elif "policy" in job.inputs:
            self._configs[job.stage] = self._config(job.inputs["policy"])

    def know(self, node: Node, job: Job) -> Known | str:
        """What is known of a stage, or why nothing can be estimated. Those before it have to be followed."""
        if node.spec.workload is None:
            return "it does not say what it does with memory"
        configs = {slot: self._config(value) for slot, value in job.inputs.items()}
        if isinstance(node.config, Makes):
            configs = {MADE: node.config.architecture()}
        unread = [job.inputs[slot].source for slot, config in configs.items() if config is None]
        if unread:
            return f"config.json of {unread[0]} is not on this machine"
        counted = {slot: self.counter.shapes(config) for slot, config in configs.items() if config is not None}
        shapes = {slot: found for slot, found in counted.items() if found is not None}
        if len(shapes) < len(counted):
            return "the library cannot build this model from its config alone"
        lengths = self._lengths(node, job)
        return Known(
            job.stage, node.config, job.inputs, shapes, lengths, job.evaluation, node.spec.workload, job.launch
        )

    def _config(self, value: Input) -> dict[str, Any] | None:
        """The config.json of an input. Made by a stage of this plan, it is that of what the stage starts from."""
        if value.source in self._configs:
            return self._configs[value.source]
        path = Path(value.path) / "config.json"
        if not path.is_file() and value.revision:
            path = cached(value.path, value.revision)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _lengths(self, node: Node, job: Job) -> Lengths:
        """Rows are counted; their tokens too, where the policy's tokenizer is a local folder by now."""
        if node.data is None or node.spec.data is None or "policy" not in job.inputs:
            return Lengths()
        rows, policy = len(load(node.data, node.spec.data).train), job.inputs["policy"]
        if not (Path(policy.path) / "tokenizer_config.json").is_file():
            return Lengths(rows)
        identity = [policy.fingerprint, job.identity["data"]]
        data, role = node.data.model_dump(mode="json"), str(node.spec.data)
        return Lengths(rows, self.counter.lengths(policy.path, policy.trust_remote_code, data, role, identity))


def know_stages(plan: Plan) -> dict[str, Known | str]:
    """What is known of each stage that runs, or why nothing is."""
    with Estimator(plan.run_dir.parent) as estimator:
        for step in plan.steps:
            estimator.follow(step.node, step.job)
        return {step.job.stage: estimator.know(step.node, step.job) for step in plan.steps if step.runs}


@runtime_checkable
class Makes(Protocol):
    """Settings of a stage that makes a model from nothing."""

    def architecture(self) -> dict[str, Any]:
        """The config.json of what it makes."""
        ...


def cached(name: str, revision: str) -> Path:
    """Where the hub's library keeps the config.json of a model that was downloaded before."""
    from huggingface_hub import constants  # here, because few models need the 0.1 s

    folder = "models--" + name.replace("/", "--")
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / revision / "config.json"
