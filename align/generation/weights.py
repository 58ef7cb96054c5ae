"""Hand-over of weights inside one process: an engine's weights are kept equal to a policy's, without a file.

Each parameter takes the cheapest exact way. Shared: policy and engine read the same memory, so an optimiser step is in
the engine at once, and there is one copy. Written: the engine keeps its own, in another dtype or because an adapter is
added to it, and is written in place. Engines fuse projections and pad vocabularies; where a parameter lies in theirs is
worked out here and proven against the engine's own loader. Where it cannot be, that loader writes all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from align.models.lora import without_wrapper
from align.models.partitioned import full, is_partitioned, whole

_LAYER = re.compile(r"(.*?\.\d+)\.")
"""The name of a layer, at the start of a weight's."""


@dataclass(frozen=True)
class Weight:
    """One parameter of the effective policy, under the name that it has in a saved model."""

    name: str
    parameter: nn.Parameter
    """The policy's own; with an adapter, that of its base."""
    effective: Callable[[], Tensor]
    """What the policy computes with now, read from `parts`, which have to be whole: see `gathered`."""
    is_plain: bool
    """Whether that is the parameter itself."""
    parts: tuple[nn.Parameter, ...]
    """The parameters that go into it."""

    @property
    def layer(self) -> str:
        """The layer that it belongs to, or else its module."""
        found = _LAYER.match(self.name)
        return found[1] if found else self.name.rpartition(".")[0]


def effective_weights(policy: nn.Module) -> list[Weight]:
    """Every parameter of a model, once if it is tied; with adapters, as if the active one were merged."""
    weights: dict[int, Weight] = {}
    adapted: list[str] = []
    for prefix, module in without_wrapper(policy).named_modules():
        if any(prefix.startswith(f"{outer}.") for outer in adapted):
            continue
        if isinstance(module, LoraLayer):
            adapted.append(prefix)
        for weight in _weights_of(prefix, module):
            weights.setdefault(id(weight.parameter), weight)
    return list(weights.values())


def _weights_of(prefix: str, module: Any) -> Iterator[Weight]:
    if not isinstance(module, LoraLayer):
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield _plain(name, parameter)
        return
    layer: Any = module
    base = layer.get_base_layer()
    for name, parameter in base.named_parameters(prefix, recurse=False):
        if name == f"{prefix}.weight":
            yield Weight(name, parameter, lambda: _adapted(layer), False, tuple(layer.parameters()))
        else:
            yield _plain(name, parameter)


def _plain(name: str, parameter: nn.Parameter) -> Weight:
    return Weight(name, parameter, lambda: full(parameter.detach()), True, (parameter,))


@torch.no_grad()
def _adapted(layer: Any) -> Tensor:
    """W + s B A of the active adapters, float32; W as its 4 bits decode, if it is in NF4."""
    base = layer.get_base_layer()
    weight = full((base.decoded() if hasattr(base, "decoded") else base).weight.detach()).float()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            weight = weight + layer.get_delta_weight(adapter).float()
    return weight


def gathered(weights: Iterable[Weight]) -> Iterator[tuple[Weight, Tensor]]:
    """Each weight, and what the policy computes with now. Of parameters that are partitioned those of one layer are
    whole at a time, so a tensor is to be used before the next one is asked for. All processes iterate alike."""
    for _, layer in groupby(weights, lambda weight: weight.layer):
        together = list(layer)
        with whole(part for weight in together for part in weight.parts):
            for weight in together:
                yield weight, weight.effective()


class HandOver:
    """Keeps the weights of an engine's model equal to a policy's.

    `load` is the engine's own loader: it takes (name, tensor) pairs under the names of a saved model, and writes in
    place. `fused` says which of the engine's modules hold several of the policy's, in order along the rows.
    """

    def __init__(
        self,
        policy: nn.Module,
        engine: nn.Module,
        load: Callable[[Iterator[tuple[str, Tensor]]], Any],
        fused: Mapping[str, Sequence[str]],
    ):
        self.weights = {weight.name: weight for weight in effective_weights(policy)}
        self._load = load
        self.targets = locate(self.weights.values(), dict(engine.named_parameters()), fused)
        self._load_all()
        if self.differing():
            self.targets = {}
        self.shared = [weight for weight in self.weights.values() if self._share(weight)]

    @property
    def summary(self) -> str:
        """How many weights go over in which way."""
        if not self.targets:
            return f"{len(self.weights)} weights written by the engine's own loader"
        adapted = sum(not weight.is_plain for weight in self.weights.values())
        copied = len(self.weights) - len(self.shared) - adapted
        counts = {"shared": len(self.shared), "copied": copied, "written with their adapter": adapted}
        return ", ".join(f"{count} weights {way}" for way, count in counts.items() if count)

    @torch.no_grad()
    def sync(self) -> None:
        """Makes the engine's weights equal to the policy's as they are now."""
        if not self.targets:
            self._load_all()
        for _, source, target in self._apart():
            target.copy_(source)

    def differing(self) -> list[str]:
        """The names of weights that the engine holds otherwise than the policy; empty also where that is unknown."""
        return [name for name, source, target in self._apart() if not torch.equal(source.to(target), target)]

    @torch.no_grad()
    def release(self) -> None:
        """Gives the policy memory of its own again."""
        for weight in self.shared:
            weight.parameter.data = weight.parameter.data.clone()
        self.shared = []

    def _apart(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The name of each weight that is not in the same memory here and there, also of those that were shared and
        were given other memory since; what the policy has, and where the engine has it."""
        placed = [weight for weight in self.weights.values() if weight.name in self.targets]
        for weight, source in gathered(placed):
            target = self.targets[weight.name]
            if source.data_ptr() != target.data_ptr():
                yield weight.name, source, target

    def _load_all(self) -> None:
        self._load((weight.name, tensor) for weight, tensor in gathered(self.weights.values()))

    def _share(self, weight: Weight) -> bool:
        """Puts a plain parameter into the engine's memory, if it may lie there."""
        target, parameter = self.targets.get(weight.name), weight.parameter
        if target is None or not weight.is_plain or not _may_share(parameter, target):
            return False
        parameter.data = target
        return True


def _may_share(parameter: Tensor, target: Tensor) -> bool:
    """A parameter in memory of somebody else's stays there: DeepSpeed's optimiser writes to the buffers that it has put
    parameters into (ZeRO-1 and 2) or parts of them (ZeRO-3, FSDP), and the engine would not see it."""
    is_its_own = not is_partitioned(parameter) and parameter.untyped_storage().nbytes() == parameter.nbytes
    same = parameter.dtype == target.dtype and parameter.device == target.device
    fits = parameter.shape == target.shape and target.is_contiguous() and not target.is_inference()
    return is_its_own and same and fits


def locate(
    weights: Iterable[Weight], engine: Mapping[str, Tensor], fused: Mapping[str, Sequence[str]]
) -> dict[str, Tensor]:
    """The part of the engine's parameters that should hold each weight, by its name: rows of a fused or a padded one.
    Empty when one has no place: then nothing is known."""
    shapes = {weight.name: tensor.shape for weight, tensor in gathered(weights)}
    targets: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        found, first = _place(name, shapes, engine, fused)
        tensor = engine.get(found)
        if tensor is None or tensor.shape[1:] != shape[1:] or len(tensor) < first + shape[0]:
            return {}
        targets[name] = tensor.detach()[first : first + shape[0]]
    return targets


def _place(
    name: str, shapes: Mapping[str, torch.Size], engine: Mapping[str, Tensor], fused: Mapping[str, Sequence[str]]
) -> tuple[str, int]:
    """The engine's name for a weight, and the row at which it begins there."""
    if name in engine:
        return name, 0
    for joined, parts in fused.items():
        for number, part in enumerate(parts):
            if f".{part}." not in name:
                continue
            before = [name.replace(f".{part}.", f".{other}.") for other in parts[:number]]
            return name.replace(f".{part}.", f".{joined}."), sum(shapes[one][0] for one in before if one in shapes)
    return name, 0
