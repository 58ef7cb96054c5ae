"""The graph of a run: where every input of every stage comes from, checked for kind before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from align.errors import ConfigError, Problem
from align.pipeline.external import artifact_folder, check_folder
from align.recipe.load import Recipe
from align.recipe.settings import DataSettings, ModelSettings, Settings
from align.recipe.spec import Kind, Slot, StageSpec


@dataclass(frozen=True)
class Source:
    """Where an input comes from: a stage of the recipe, or (`model` is set) a local folder or hub id."""

    name: str
    model: ModelSettings | None = None


@dataclass(frozen=True)
class Node:
    """A stage of the graph with its inputs resolved."""

    name: str
    spec: StageSpec
    config: Settings
    data: DataSettings | None
    inputs: dict[str, Source]


def build_graph(recipe: Recipe, requested: Sequence[str]) -> list[Node]:
    """The stages asked for (none: all of the recipe) and those they need, each after its inputs.

    Raises ConfigError with every problem.
    """
    nodes: dict[str, Node] = {}
    problems: list[Problem] = []
    waiting = list(requested) or [name for name in recipe.stages if not _gives_way(recipe, name, requested)]
    if not waiting:
        raise ConfigError(Problem("align", "no stage to run", "name one: `align run sft reward ppo`"))
    while waiting:
        name = waiting.pop()
        if name in nodes:
            continue
        nodes[name] = _node(recipe, name, requested, problems)
        waiting += [source.name for source in nodes[name].inputs.values() if source.model is None]
    if problems:
        raise ConfigError(problems)
    return _in_order(nodes, list(recipe.stages))


def _in_order(nodes: dict[str, Node], listed: list[str]) -> list[Node]:
    """Topological order; stages that do not depend on each other keep the recipe's order."""
    needs = {
        name: [source.name for source in nodes[name].inputs.values() if source.model is None]
        for name in sorted(nodes, key=listed.index)
    }
    try:
        return [nodes[name] for name in TopologicalSorter(needs).static_order()]
    except CycleError as error:
        path = " <- ".join(error.args[1])
        raise ConfigError(Problem(error.args[1][0], f"stages consume each other in a circle: {path}")) from error


def _node(recipe: Recipe, name: str, requested: Sequence[str], problems: list[Problem]) -> Node:
    stage = recipe.stages[name]
    inputs: dict[str, Source] = {}
    for slot_name, slot in stage.spec.inputs.items():
        given = getattr(stage.config, slot_name, None)
        if given is None and slot.same_as is not None:
            if slot.same_as in inputs:  # else its problem is already listed
                inputs[slot_name] = inputs[slot.same_as]
            continue
        source = _resolve(recipe, f"{name}.{slot_name}", slot, given, requested)
        found = source if isinstance(source, Problem) else _check(recipe, f"{name}.{slot_name}", slot, source)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            inputs[slot_name] = found
    data = (getattr(stage.config, "data", None) or recipe.settings.data) if stage.spec.data else None
    if stage.spec.data and data is None:
        problems.append(
            Problem(f"{name}.data", f"no {stage.spec.data}", f"set `{name}.data:` or `data:`, or --data FILE")
        )
    return Node(name, stage.spec, stage.config, data, inputs)


def _resolve(recipe: Recipe, where: str, slot: Slot, given: str | None, requested: Sequence[str]) -> Source | Problem:
    """The source of a slot: what the recipe says, else the slot's defaults, else the recipe's model."""
    if given is not None:
        return _named(recipe, given)
    stages = [name for name in recipe.stages if not _gives_way(recipe, name, requested)]
    for name in slot.defaults:
        if name in stages and name != where.partition(".")[0]:
            return Source(name)
    if slot.kind is not Kind.POLICY:
        wanted = " or ".join(f"`{name}`" for name in slot.defaults)
        return Problem(where, f"no {slot.kind} to use", f"add a {wanted} stage, or set `{where}:` to a model")
    if recipe.settings.model is None:
        return Problem(where, "nothing to start from", "set `model:` or --model PATH, or add a `base` stage")
    return Source(recipe.settings.model.path, recipe.settings.model)


def _gives_way(recipe: Recipe, name: str, requested: Sequence[str]) -> bool:
    """A stage that makes a model from nothing gives way to the recipe's `model`, unless asked for."""
    return recipe.settings.model is not None and not recipe.stages[name].spec.inputs and name not in requested


def _named(recipe: Recipe, given: str) -> Source:
    """The source called `given`. The recipe has made sure that it is a stage, a folder or a hub id."""
    model = recipe.settings.model
    if given in recipe.stages:
        return Source(given)
    if model is not None and given in {model.path, f"{model.path}@{model.revision}"}:
        return Source(model.path, model)
    if Path(given).is_dir():  # not split at "@", which a folder's name may have
        return Source(given, ModelSettings.model_construct(path=given, revision=None, trust_remote_code=False))
    return Source(given, ModelSettings(path=given))


def _check(recipe: Recipe, where: str, slot: Slot, source: Source) -> Source | Problem:
    """The source itself if it is of the kind the slot wants. A hub id is checked when it is loaded."""
    if source.model is None:
        kind = recipe.stages[source.name].spec.output
    elif Path(source.model.path).is_dir():
        folder = artifact_folder(Path(source.model.path))
        kind = check_folder(folder, trust_remote_code=source.model.trust_remote_code)
    else:
        return source
    if kind is slot.kind:
        return source
    better = [name for name, stage in recipe.stages.items() if stage.spec.output is slot.kind]
    hint = f"did you mean {' or '.join(repr(name) for name in better)}?" if better else ""
    return Problem(where, f"wants a {slot.kind}; {source.name} gives a {kind}", hint)
