"""The memory of a stage, by part and by phase: what one process holds at most while it trains, samples and saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from align.pipeline.estimate.activations import (
    Width,
    fused_logits,
    holes,
    kept,
    kv_cache,
    passing,
    ppo_logits,
    sampling_logits,
    whole_logits,
)
from align.pipeline.estimate.shapes import Shapes
from align.pipeline.estimate.strategies import STRATEGIES, States, states
from align.pipeline.estimate.workload import Held, Sampling, Step, Workload
from align.recipe.training_settings import LoraSettings

MIB = 2**20
PROCESS = 640 * MIB
"""Python, torch, transformers, TRL and what they hold before a model is loaded; measured on a CPU
(docs/memory_estimate.md). On a GPU it is in main memory."""
CONTEXT = 600 * MIB
"""What CUDA and its libraries take of a GPU before the first tensor. Taken, not measured."""
PARTS = ("process", "weights", "gradients", "optimiser", "copies", "activations", "logits", "KV cache", "heap", "check")
"""In the order in which they are shown."""


@dataclass(frozen=True)
class Device:
    """What a process computes on."""

    memory: int | None = None
    """Bytes of a GPU; None: a CPU, whose memory is the machine's."""
    count: int = 1
    """GPUs, all of one kind."""

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.memory is not None


CPU = Device()


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs at most."""

    phases: dict[str, dict[str, float]]
    """By phase (training, sampling, normalising, saving), then by part."""
    models: dict[str, float]
    """Weights, gradients and optimiser of each role."""
    host: float
    """Main memory of this process besides, where states are offloaded."""
    disk: float
    """Disk of this process, likewise."""

    @property
    def phase(self) -> str:
        """The one that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """The parts of that phase."""
        return self.phases[self.phase]

    @property
    def cache(self) -> float:
        """The largest KV cache, also where another phase needs more."""
        return max(parts.get("KV cache", 0.0) for parts in self.phases.values())

    @property
    def peak(self) -> float:
        """Their sum."""
        return sum(self.parts.values())


def trained_numbers(model: Held, shapes: Shapes) -> int:
    """How many numbers of a model are trained."""
    lora = model.lora
    own_head = 0 if model.has_head else shapes.hidden
    if model.trained == "all":
        return (shapes.parameters if model.has_head else shapes.backbone) + own_head
    if model.trained == "adapter" and lora is not None:
        return shapes.adapter(lora) + (shapes.hidden if model.is_adapter else own_head)
    return 0


def narrow_numbers(model: Held, shapes: Shapes) -> int:
    """How many trained numbers of a model have moments in 8 bits."""
    if model.moments_8bit == "none":
        return 0
    wide = shapes.embedding if model.moments_8bit == "layers" and model.trained == "all" else 0
    return trained_numbers(model, shapes) - wide


def frozen_bytes(model: Held, shapes: Shapes, size: int) -> float:
    """Bytes of the numbers of a model that are not trained, `size` bytes each where they are not in NF4."""
    if model.trained == "all":
        return 0
    if model.is_adapter:
        return shapes.adapter(model.lora) * 4 if model.lora and model.trained == "nothing" else 0
    numbers = shapes.parameters if model.has_head else shapes.backbone
    return shapes.frozen_bytes(size, model.lora.quantise if model.lora else None, numbers)


class _Process:
    """One process of a stage: what it holds in each phase, by part."""

    def __init__(
        self, work: Workload, shapes: Mapping[str, Shapes], strategy: str, processes: int, device: Device, compute: int
    ):
        self.work, self.shapes, self.device, self.compute = work, shapes, device, compute
        self.strategy = STRATEGIES[strategy]
        stream = compute if self.strategy.engine == "deepspeed" else 4
        self.width = Width(stream, compute)
        self.models = {model.role: model for model in work.models}
        self.states = {role: self._states(model, processes) for role, model in self.models.items()}

    def _states(self, model: Held, processes: int) -> States:
        shapes = self.shapes[model.source]
        size = self.compute if self.strategy.engine == "deepspeed" or model.is_rounded else 4
        trained, frozen = trained_numbers(model, shapes), frozen_bytes(model, shapes, size)
        block = max(shapes.largest, shapes.quantisable // shapes.layers)
        on_gpu, narrow = self.device.is_gpu, narrow_numbers(model, shapes)
        sizes = {"compute": self.compute, "largest": block, "narrow": narrow, "bucket": self.work.bucket}
        found = states(self.strategy, processes, trained, frozen, on_gpu=on_gpu, **sizes)
        if model.offloaded and on_gpu:
            return States(0, 0, 0, found.weights, host=found.weights)
        return found

    def total(self, part: str) -> float:
        return sum(getattr(one, part) for one in self.states.values())

    def resident(self, weights: float) -> dict[str, float]:
        """What is there in every phase, with so many bytes of weights."""
        start = CONTEXT if self.device.is_gpu else PROCESS
        return {"process": start, "weights": weights, "optimiser": self.total("optimiser")}

    def trained(self) -> dict[str, float]:
        """What is there when training is over: every process has whole models again, to measure and save them. In a
        loop of our own the policy alone is whole, also whenever it samples."""
        weights = self.total("whole")
        if self.work.bucket is not None:
            policy = self.states[self.work.models[0].role]
            weights = self.total("weights") - policy.weights + policy.whole
        return self.resident(weights) | {"copies": self.total("left")}

    def training(self, step: Step) -> dict[str, float]:
        """While a role computes its passes. As gradients come, activations go: a GPU's allocator uses their memory
        again, so that of a single pass only the larger of the two is there. The heap of a CPU's process mostly does
        not."""
        shapes = self.shapes[self.models[step.role].source]
        lora = self._adapter(step)
        activations = kept(shapes, step.one, self.width, lora)
        logits = self._logits(step, shapes)
        gradients, on_gpu = self.total("gradients"), self.device.is_gpu
        if on_gpu and not step.accumulates:
            gradients -= min(self.states[step.role].gradients, activations)
        return self.resident(self.total("weights")) | {
            "gradients": gradients,
            "copies": self.total("copies"),
            "activations": activations + max(0.0, passing(shapes, step.one, self.width) - logits),
            "logits": logits,
            "heap": holes(shapes, step.one, self.width, lora) if lora and not on_gpu else 0.0,
        }

    def _adapter(self, step: Step) -> LoraSettings | None:
        model = self.models[step.role]
        return model.lora if model.trained == "adapter" else None

    def _logits(self, step: Step, shapes: Shapes) -> float:
        if step.logits == "fused":
            return fused_logits(shapes, step.one, self.width, on_gpu=self.device.is_gpu)
        if step.logits == "whole":
            return whole_logits(shapes, step.one)
        if step.logits == "ppo":
            return ppo_logits(shapes, step.response_tokens, on_gpu=self.device.is_gpu)
        return 0.0

    def sampling(self, one: Sampling) -> dict[str, float]:
        """While responses are sampled, from the weights of the policy that is trained."""
        shapes = self.shapes[self.work.models[0].source]
        size = self.compute
        cache = kv_cache(shapes, one.rows, one.width, size)
        if one.on_vllm:
            share = self.device.memory * one.gpu_share if self.device.memory is not None else cache
            cache = one.cache_bytes or max(0.0, share)
        return self.trained() | {"KV cache": cache, "logits": sampling_logits(shapes, one.rows)}

    def saving(self) -> dict[str, float]:
        """On a CPU, while the saved model is loaded afresh to be checked; an adapter's base in NF4 is decoded before.
        The heap still has what the passes took from it. On a GPU this happens in main memory."""
        model = self.work.models[0]
        shapes = self.shapes[model.source]
        whole = 4 * (shapes.parameters if model.has_head else shapes.backbone)
        parts = self.trained()
        if model.lora is not None and model.lora.quantise:
            parts["weights"] += whole - self.states[model.role].weights
        return parts | {"heap": max(map(self._left, self.work.steps), default=0.0), "check": whole}

    def _left(self, step: Step) -> float:
        """Bytes of a pass that are in the heap after it. Gradients take the places of activations, unless an earlier
        pass left them: then they lie between."""
        shapes, lora = self.shapes[self.models[step.role].source], self._adapter(step)
        left = kept(shapes, step.one, self.width, lora)
        if step.accumulates and self.strategy.engine == "torch":  # DeepSpeed's gradients are in its own buffers
            left += self.states[step.role].gradients
        return left + (holes(shapes, step.one, self.width, lora) if lora else 0.0)

    def reopening(self, source: str) -> dict[str, float]:
        """While a policy is opened once more, to sample from it."""
        shapes = self.shapes[source]
        model = self.work.models[0]
        size = shapes.frozen_bytes(4, model.lora.quantise if model.lora else None, shapes.parameters)
        parts = max((self.sampling(one) for one in self.work.samplings), key=lambda found: sum(found.values()))
        return parts | {"weights": parts["weights"] + size}


def memory(
    work: Workload,
    shapes: Mapping[str, Shapes],
    *,
    strategy: str = "one",
    processes: int = 1,
    device: Device = CPU,
    compute: int = 4,
) -> Memory:
    """What one of the stage's processes needs. `shapes` are by the name of the input, `compute` are the bytes of a
    number in the passes (4: float32, 2: bfloat16)."""
    process = _Process(work, shapes, strategy, processes, device, compute)
    phases = {}
    for name, found in (
        ("training", [process.training(step) for step in work.steps]),
        ("sampling", [process.sampling(one) for one in work.samplings]),
        ("normalising", [process.reopening(work.reopened)] if work.reopened else []),
        ("saving", [] if device.is_gpu else [process.saving()]),
    ):
        if found:
            phases[name] = max(found, key=lambda parts: sum(parts.values()))
    models = {role: one.weights + one.gradients + one.optimiser for role, one in process.states.items()}
    return Memory(phases, models, process.total("host"), process.total("disk"))
