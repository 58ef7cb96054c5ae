"""What a stage's result depends on, as plain JSON, and the job that makes it.

The identity of a stage holds its kind and version, every setting that can change the result, the content of
its data, the fingerprints of its inputs, and its seed; not where files lie, nor how often things are logged.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from align.data.load import content_hash
from align.errors import ConfigError, DataError, Problem
from align.job import Input, Job
from align.pipeline.external import HashCache, hub_input, local_input
from align.pipeline.graph import Node, Source
from align.recipe.settings import DataSettings, EvaluationSettings, RecipeSettings
from align.records import fingerprint, sha256_file

PLACES = ("path", "held_out_path")
"""Fields of DataSettings that say where rows lie; the content hash stands for them."""


def make_jobs(settings: RecipeSettings, nodes: Sequence[Node], run_dir: Path, cache: HashCache) -> list[Job]:
    """One job per stage, in the order of `nodes`. Raises DataError with all unreadable files."""
    hashes = _content_hashes([node.data for node in nodes] + [settings.evaluation.data])
    evaluation = _evaluation_identity(settings.evaluation, hashes)
    jobs: dict[str, Job] = {}
    for node in nodes:
        inputs = {slot: _input(node, slot, source, jobs, cache) for slot, source in node.inputs.items()}
        own_seed = getattr(node.config, "seed", None)
        seed = settings.seed if own_seed is None else own_seed
        identity = {
            "kind": node.spec.kind,
            "version": node.spec.version,
            "seed": seed,
            "config": _without({*node.spec.inputs, "seed", "kind", "data"}, semantic(node.config)),
            "data": _data_identity(node.data, hashes),
            "inputs": {slot: value.fingerprint for slot, value in inputs.items()},
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
    )


def semantic(value: Any) -> Any:
    """Settings as plain JSON without the fields marked `execution`, at any depth."""
    if isinstance(value, BaseModel):
        return {
            name: semantic(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("execution"))
        }
    if isinstance(value, Mapping):
        return {str(key): semantic(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [semantic(item) for item in value]
    return to_jsonable_python(value)


def _without(names: set[str], fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _content_hashes(data: Sequence[DataSettings | None]) -> dict[str, str]:
    """The content hash of each distinct data setting, keyed by its JSON: a shared file is read once."""
    hashes: dict[str, str] = {}
    problems: list[Problem] = []
    for settings in {item.model_dump_json(): item for item in data if item is not None}.values():
        try:
            hashes[settings.model_dump_json()] = content_hash(settings)
        except DataError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise DataError(problems)
    return hashes


def _data_identity(data: DataSettings | None, hashes: Mapping[str, str]) -> dict[str, Any] | None:
    if data is None:
        return None
    return {"content": hashes[data.model_dump_json()], **_without(set(PLACES), semantic(data))}


def _evaluation_identity(evaluation: EvaluationSettings, hashes: Mapping[str, str]) -> dict[str, Any]:
    identity = semantic(evaluation) | {"data": _data_identity(evaluation.data, hashes)}
    if evaluation.gold is not None:
        identity["gold_source"] = sha256_file(module_file(evaluation.gold.partition(":")[0]))
    return identity


def _input(node: Node, slot: str, source: Source, jobs: Mapping[str, Job], cache: HashCache) -> Input:
    if source.model is None:
        made = jobs[source.name]
        kind = node.spec.inputs[slot].kind
        return Input(str(kind), str(Path(made.directory) / "model"), made.fingerprint, source.name)
    folder = Path(source.model.path)
    if folder.is_dir():
        return local_input(folder, source.name, cache, trust_remote_code=source.model.trust_remote_code)
    return hub_input(source.model, node.spec.inputs[slot].kind, f"{node.name}.{slot}")


def module_file(name: str) -> Path:
    """The source file of a dotted module, without importing it. The current folder counts, as in a worker."""
    top, *rest = name.split(".")
    spec = PathFinder.find_spec(top, [str(Path.cwd())]) or importlib.util.find_spec(top)
    for depth in range(len(rest)):
        if spec is None or spec.submodule_search_locations is None:
            break
        full = ".".join([top, *rest[: depth + 1]])
        spec = PathFinder.find_spec(full, list(spec.submodule_search_locations))
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        places = "the current folder or among the installed packages"
        raise ConfigError(Problem("evaluation.gold", f"no module {name!r}", f"it is looked for in {places}"))
    return Path(spec.origin)
