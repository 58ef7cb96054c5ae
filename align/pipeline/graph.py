"""The graph of a run: where every input of every stage comes from, checked for kind before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from align.errors import ConfigError, Problem
from align.pipeline.external import artifact_folder, check_folder
from align.recipe.data_settings import DataSettings, Role
from align.recipe.launch_settings import LaunchSettings
from align.recipe.load import Recipe
from align.recipe.recipe_settings import RecipeSettings
from align.recipe.settings import Settings
from align.recipe.spec import Kind, Slot, StageSpec
from align.recipe.training_settings import ModelSettings


@dataclass(frozen=True)
class Want:
    """An input that a stage wants: `key` is its name, one of those of its slot."""

    stage: str
    slot_name: str
    key: str
    slot: Slot

    @property
    def where(self) -> str:
        """As messages write it: `ppo.reward`, `ppo.reward.2`, `ppo.reward.safety`."""
        is_own = self.key.split(".")[0] == self.slot_name
        return f"{self.stage}.{self.key}" if is_own else f"{self.stage}.{self.slot_name}.{self.key}"


@dataclass(frozen=True)
class Source:
    """Where an input comes from: a stage of the recipe, or (`model` is set) a local folder or hub id."""

    name: str
    want: Want
    """The input that it was found for; another slot may share it."""
    model: ModelSettings | None = None


@dataclass(frozen=True)
class Node:
    """A stage of the graph with its inputs resolved."""

    name: str
    spec: StageSpec
    config: Settings
    data: DataSettings | None
    inputs: dict[str, Source]
    """By the name of the input; a slot may have several."""

    @property
    def needs(self) -> list[str]:
        """The stages it consumes."""
        return [source.name for source in self.inputs.values() if source.model is None]

    def reads(self) -> Iterator[tuple[str, DataSettings, Role]]:
        """All data of the stage: the setting's dotted key, and what it is read as."""
        if self.data and self.spec.data:
            yield "data", self.data, self.spec.data
        for path, role in self.spec.more_data.items():
            value: Any = self.config
            for key in path.split("."):
                value = getattr(value, key, None)
            if value is not None:
                yield path, value, role


def wanted_launch(config: Settings, settings: RecipeSettings) -> LaunchSettings:
    """What the recipe says of the processes of a stage with this config."""
    return getattr(config, "launch", None) or settings.launch


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
        waiting += nodes[name].needs
    if problems:
        raise ConfigError(problems)
    return _in_order(nodes, list(recipe.stages))


def _in_order(nodes: dict[str, Node], listed: list[str]) -> list[Node]:
    """Topological order; stages that do not depend on each other keep the recipe's order."""
    needs = {name: nodes[name].needs for name in sorted(nodes, key=listed.index)}
    try:
        return [nodes[name] for name in TopologicalSorter(needs).static_order()]
    except CycleError as error:
        path = " <- ".join(error.args[1])
        raise ConfigError(Problem(error.args[1][0], f"stages consume each other in a circle: {path}")) from error


def _node(recipe: Recipe, name: str, requested: Sequence[str], problems: list[Problem]) -> Node:
    stage = recipe.stages[name]
    inputs: dict[str, Source] = {}
    for slot_name, slot in stage.spec.inputs.items():
        for key, given in stage.config.sources(slot_name).items():
            if given is None and slot.same_as is not None:
                if slot.same_as in inputs:  # else its problem is already listed
                    inputs[key] = inputs[slot.same_as]
                continue
            found = _source(recipe, Want(name, slot_name, key, slot), given, requested)
            if isinstance(found, Problem):
                problems.append(found)
            else:
                inputs[key] = found
    data = (getattr(stage.config, "data", None) or recipe.settings.data) if stage.spec.data else None
    if stage.spec.data and data is None:
        problems.append(
            Problem(f"{name}.data", f"no {stage.spec.data}", f"set `{name}.data:` or `data:`, or --data FILE")
        )
    return Node(name, stage.spec, stage.config, data, inputs)


def _source(recipe: Recipe, want: Want, given: str | None, requested: Sequence[str]) -> Source | Problem:
    """Where a wanted input comes from, if that is of the right kind. A hub id is checked when it is loaded."""
    found = _default(recipe, want, requested) if given is None else _named(recipe, want, given)
    if isinstance(found, Problem):
        return found
    if found.model is None:
        kind = recipe.stages[found.name].spec.output
    elif Path(found.model.path).is_dir():
        folder = artifact_folder(Path(found.model.path))
        kind = check_folder(folder, trust_remote_code=found.model.trust_remote_code)
    else:
        return found
    if kind is want.slot.kind:
        return found
    better = [name for name, stage in recipe.stages.items() if stage.spec.output is want.slot.kind]
    hint = f"did you mean {' or '.join(repr(name) for name in better)}?" if better else ""
    return Problem(want.where, f"wants a {want.slot.kind}; {found.name} gives a {kind}", hint)


def _default(recipe: Recipe, want: Want, requested: Sequence[str]) -> Source | Problem:
    """What a slot takes when the recipe names nothing: a stage, else the recipe's model."""
    stages = [name for name in recipe.stages if not _gives_way(recipe, name, requested)]
    for name in want.slot.defaults:
        if name in stages and name != want.stage:
            return Source(name, want)
    if want.slot.kind is not Kind.POLICY:
        wanted = " or ".join(f"`{name}`" for name in want.slot.defaults)
        hint = f"add a {wanted} stage, or set `{want.where}:` to a model"
        return Problem(want.where, f"no {want.slot.kind} to use", hint)
    if recipe.settings.model is None:
        return Problem(want.where, "nothing to start from", "set `model:` or --model PATH, or add a `base` stage")
    return Source(recipe.settings.model.path, want, recipe.settings.model)


def _named(recipe: Recipe, want: Want, given: str) -> Source:
    """The source called `given`. The recipe has made sure that it is a stage, a folder or a hub id."""
    model = recipe.settings.model
    if given in recipe.stages:
        return Source(given, want)
    if model is not None and given in {model.path, f"{model.path}@{model.revision}"}:
        return Source(model.path, want, model)
    if Path(given).is_dir():  # not split at "@", which a folder's name may have
        return Source(given, want, ModelSettings.model_construct(path=given, revision=None, trust_remote_code=False))
    return Source(given, want, ModelSettings(path=given))


def _gives_way(recipe: Recipe, name: str, requested: Sequence[str]) -> bool:
    """A stage that makes a model from nothing gives way to the recipe's `model`, unless asked for."""
    return recipe.settings.model is not None and not recipe.stages[name].spec.inputs and name not in requested
