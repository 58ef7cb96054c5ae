"""What a stage's result depends on, as plain JSON, and the job that makes it.

The identity of a stage holds its kind and version, every setting that can change the result, the content of
its data, the fingerprints of its inputs, and its seed; not where files lie, nor how often things are logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from align.data.load import content_hash
from align.errors import DataError, Problem
from align.job import Input, Job
from align.pipeline.external import HashCache, adapter_facts, hub_input, local_input
from align.pipeline.functions import source_hash
from align.pipeline.graph import Node, Source, wanted_launch
from align.recipe.data_settings import DATA_PLACES, DataSettings, ReadSettings
from align.recipe.recipe_settings import RecipeSettings
from align.recipe.settings import is_marked
from align.records import fingerprint

CACHE = ".cache"
"""Folder beside the runs that they share: what is in it can be removed at any time."""

PLACES = (*DATA_PLACES, "files")
"""Settings of data that say where rows lie; the content hash stands for them."""

NOT_ITS_OWN = ("kind", "seed", "data")
"""Settings of a stage that its identity has in a place of their own, with what the recipe says for all stages."""

SOURCE = "_source"
"""Added to the name of a setting that names a function: the key of the hash of its module's source."""

UNUSED = ("execution", "source")
"""Marks of settings that the identity leaves out: they change nothing, or the inputs' fingerprints stand for them."""


def make_jobs(
    settings: RecipeSettings, nodes: Sequence[Node], run_dir: Path, cache: HashCache, contents: Contents
) -> list[Job]:
    """One job per stage, in the order of `nodes`."""
    evaluation = semantic(settings.evaluation, "evaluation", contents)
    jobs: dict[str, Job] = {}
    for node in nodes:
        inputs = {key: _input(source, jobs, cache) for key, source in node.inputs.items()}
        config = semantic(node.config, node.name, contents)
        own_seed = getattr(node.config, "seed", None)
        identity = {
            "stage": node.name,  # part of every seed (Context.seed): the same settings under two names are two models
            "kind": node.spec.kind,
            "version": node.spec.version,
            "seed": settings.seed if own_seed is None else own_seed,
            "config": {name: value for name, value in config.items() if name not in NOT_ITS_OWN},
            "data": semantic(node.data, f"{node.name}.data", contents),
            "inputs": {key: value.fingerprint for key, value in inputs.items()},
            "evaluation": evaluation,
        }
        jobs[node.name] = _job(settings, node, inputs, identity, run_dir)
    return list(jobs.values())


def _job(
    settings: RecipeSettings, node: Node, inputs: dict[str, Input], identity: dict[str, Any], run_dir: Path
) -> Job:
    seed = identity["seed"]
    key = fingerprint(identity)
    filled: dict[str, Any] = {"seed": seed} | ({"data": node.data} if node.data else {})
    return Job(
        stage=node.name,
        kind=node.spec.kind,
        version=node.spec.version,
        fingerprint=key,
        seed=seed,
        directory=str(run_dir / node.name / key[:8]),
        config=node.config.model_copy(update=filled).model_dump(mode="json"),
        inputs=inputs,
        evaluation=settings.evaluation.model_dump(mode="json"),
        track=list(settings.track),
        identity=identity,
        cache=str(run_dir.parent / CACHE),
        launch=wanted_launch(node.config, settings).model_dump(mode="json") if node.spec.distributed else None,
    )


class Contents:
    """The content hash of each distinct data setting: a shared file is read once. Raises DataError with all faults."""

    def __init__(self, nodes: Sequence[Node], evaluation: DataSettings | None):
        data = [data for node in nodes for _, data, _ in node.reads()] + [evaluation]
        self._hashes: dict[str, str] = {}
        problems: list[Problem] = []
        for settings in {item.model_dump_json(): item for item in data if item is not None}.values():
            try:
                self._hashes[settings.model_dump_json()] = content_hash(settings)
            except DataError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        if problems:
            raise DataError(problems)

    def __getitem__(self, settings: DataSettings) -> str:
        return self._hashes[settings.model_dump_json()]


def semantic(value: Any, where: str, contents: Contents) -> Any:
    """What of some settings can change the result, as plain JSON, at any depth: data by its content, functions with a
    hash of their source. `where` is the dotted key for messages. Raises ConfigError for a function that is not there.
    """
    if isinstance(value, BaseModel):
        content = {"content": contents[value]} if isinstance(value, DataSettings) else {}
        return content | _fields(value, where, contents)
    if isinstance(value, Mapping):
        return {str(key): semantic(item, f"{where}.{key}", contents) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [semantic(item, where, contents) for item in value]
    return to_jsonable_python(value)


def _fields(settings: BaseModel, where: str, contents: Contents) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        if any(is_marked(field, mark) for mark in UNUSED) or (isinstance(settings, ReadSettings) and name in PLACES):
            continue
        value, key = getattr(settings, name), f"{where}.{name}"
        fields[name] = semantic(value, key, contents)
        if value is not None and is_marked(field, "function"):
            fields[name + SOURCE] = source_hash(value, key)
    return fields


def _input(source: Source, jobs: Mapping[str, Job], cache: HashCache) -> Input:
    kind = source.want.slot.kind
    if source.model is None:
        made = jobs[source.name]
        trained = adapter_facts(made.config, {key: value.fingerprint for key, value in made.inputs.items()})
        return Input(str(kind), str(Path(made.directory) / "model"), made.fingerprint, source.name, **trained)
    folder = Path(source.model.path)
    if folder.is_dir():
        return local_input(folder, source.name, cache, trust_remote_code=source.model.trust_remote_code)
    return hub_input(source.model, kind, source.want.where)
