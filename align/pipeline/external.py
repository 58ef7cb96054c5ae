"""Models that no stage of this recipe made: local folders, finished stages of other runs, and hub ids.

Says what kind of model a folder holds and what identifies it, and refuses what could run foreign code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.errors import ArtifactError, ConfigError, Problem, WriteError
from align.job import Input
from align.recipe.spec import Kind
from align.recipe.training_settings import ModelSettings
from align.records import MANIFEST, fingerprint, read_manifest, sha256_file, write_json

COMMIT = re.compile(r"[0-9a-f]{40}")
IDENTITY_SUFFIXES = (".safetensors", ".json", ".model", ".jinja", ".py")
IDENTITY_NAMES = ("merges.txt", "vocab.txt")


class HashCache:
    """sha256 of files, remembered by path, size, time and inode: a large model is read once."""

    def __init__(self, runs: Path):
        self.path = runs / ".hashes.json"
        self._new = False
        try:
            self._entries: dict[str, list[Any]] = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._entries = {}

    def sha256(self, path: Path) -> str:
        """sha256 of a file, from memory if the file looks untouched."""
        stat = path.stat()
        facts = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._entries.get(str(path))
        if known and known[:3] == facts:
            return known[3]
        digest = sha256_file(path)
        self._entries[str(path)] = [*facts, digest]
        self._new = True
        return digest

    def save(self) -> None:
        """Keeps what was learnt, if there is a runs folder to keep it in."""
        if self._new and self.path.parent.is_dir():
            with suppress(WriteError):  # a folder that may only be read can still be planned in
                write_json(self.path, self._entries)


def artifact_folder(folder: Path) -> Path:
    """The model folder meant by a path: a finished stage's folder stands for its `model/`."""
    return folder / "model" if (folder / "record.json").is_file() else folder


def check_folder(folder: Path, *, trust_remote_code: bool) -> Kind:
    """The kind of model a local folder holds. Raises ArtifactError on what cannot or must not be loaded."""
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise ArtifactError(
                f"{folder}: this is an adapter without its base model; merge it (peft: merge_and_unload, "
                "then save_pretrained), or name the stage that made it"
            )
        raise ArtifactError(f"{folder}: not a model folder: config.json is missing")
    if not any(name.endswith(".safetensors") for name in names):
        if any(name.endswith(".bin") for name in names):
            raise ArtifactError(
                f"{folder}: only .bin weights, which can run code when loaded; convert them once: "
                "model.save_pretrained(folder) on a machine you trust writes model.safetensors"
            )
        raise ArtifactError(f"{folder}: not a model folder: no *.safetensors file in it")
    config = _read_object(folder / "config.json")
    if "auto_map" in config and not trust_remote_code:
        raise ArtifactError(
            f"{folder}: config.json asks to run Python code that comes with the model (auto_map); read it, "
            "then set `trust_remote_code: true` under the recipe's `model`"
        )
    _check_shards(folder)
    return _kind(folder, config)


def _kind(folder: Path, config: dict[str, Any]) -> Kind:
    architectures = config.get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return Kind.REWARD
    if any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return Kind.POLICY
    raise ArtifactError(
        f"{folder}: config.json names architectures {architectures}; wanted one ending in ForCausalLM "
        "(a policy) or ForSequenceClassification (a reward model)"
    )


def _check_shards(folder: Path) -> None:
    """Every shard of an index must be a plain file of the folder: nothing outside it is ever opened."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    weights = _read_object(index).get("weight_map")
    if not isinstance(weights, dict):
        raise ArtifactError(f"{index}: no weight_map in it")
    for name in sorted({str(value) for value in weights.values()}):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ArtifactError(f"{index}: weight_map names {name!r}, which is not a plain .safetensors file name")
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: {name} is named in {index.name} but missing")


def local_input(folder: Path, source: str, cache: HashCache, *, trust_remote_code: bool) -> Input:
    """A local folder as an input, known by its stage's fingerprint if align made it, else by its content."""
    folder = artifact_folder(folder)
    kind = check_folder(folder, trust_remote_code=trust_remote_code)
    record = _record_of(folder)
    trained = {}
    if record is not None:
        identity = str(record["fingerprint"])
        trained = adapter_facts(
            record["config"], {key: value["fingerprint"] for key, value in record["inputs"].items()}
        )
    elif (folder / MANIFEST).exists():
        identity = fingerprint(read_manifest(folder)["files"])
    else:
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        identity = fingerprint({path.name: cache.sha256(path) for path in files if _identifies(path.name)})
    return Input(str(kind), str(folder), identity, source, trust_remote_code=trust_remote_code, **trained)


def adapter_facts(config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """`Input.adapter_of` and `Input.quantise` of what a stage makes, from its config and its inputs' fingerprints."""
    lora = config.get("lora")
    return {"adapter_of": inputs["policy"], "quantise": lora.get("quantise")} if lora else {}


def _identifies(name: str) -> bool:
    return name.endswith(IDENTITY_SUFFIXES) or name in IDENTITY_NAMES


def _record_of(folder: Path) -> dict[str, Any] | None:
    """The record of the stage that made a model folder; None when align has not recorded it. Raises ArtifactError when
    files of it are gone."""
    record = folder.parent / "record.json"
    if folder.name != "model" or not record.is_file() or not (folder / MANIFEST).exists():
        return None
    read_manifest(folder)
    return _read_object(record)


def hub_input(model: ModelSettings, kind: Kind, where: str) -> Input:
    """A hub id as an input, pinned to one commit. Its kind is checked when it is loaded."""
    revision = model.revision if model.revision and COMMIT.fullmatch(model.revision) else _ask_hub(model, where)
    identity = fingerprint({"hub": model.path, "revision": revision})
    return Input(str(kind), model.path, identity, model.path, revision, model.trust_remote_code)


def _ask_hub(model: ModelSettings, where: str) -> str:
    name = f"{model.path}@{model.revision}" if model.revision else model.path
    problem = Problem(where, f"{name} is not pinned to a commit", f"write `{model.path}@<40 hex digits>`")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise ConfigError(problem)
    from huggingface_hub import HfApi  # here, because only unpinned ids pay the 0.3 s

    try:
        commit = HfApi().model_info(model.path, revision=model.revision, timeout=10).sha
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError([problem, Problem(where, f"the hub was asked for its commit: {reason}")]) from error
    if commit is None:
        raise ConfigError(problem)
    return commit


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: a JSON object was expected")
    return value
