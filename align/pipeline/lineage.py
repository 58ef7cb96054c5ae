"""The ancestry of a result: which stages, data and seeds it was made from, and if every file is intact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import ArtifactError
from align.pipeline.folders import RECORD, newest_record, read_record
from align.records import read_manifest


@dataclass(frozen=True)
class Ancestor:
    """A result and what it was made from. Without a record it is a model that align did not make."""

    slot: str
    """The input of its consumer that this is; empty at the top."""
    source: str
    """Stage name, hub id or folder."""
    path: str
    fingerprint: str
    record: dict[str, Any] | None = None
    damage: str | None = None
    """What is wrong with its files; None when every sha256 agrees with the manifest."""
    inputs: list[Ancestor] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The tree as plain JSON, for `align lineage --json`."""
        keys = (
            "kind",
            "output",
            "seed",
            "data",
            "metrics",
            "started",
            "ended",
            "seconds",
            "versions",
            "git",
            "command",
        )
        facts = {key: self.record[key] for key in keys} if self.record else {}
        return {
            "slot": self.slot,
            "source": self.source,
            "path": self.path,
            "fingerprint": self.fingerprint,
            **facts,
            "verified": self.record is not None and self.damage is None,
            "damage": self.damage,
            "inputs": [ancestor.as_json() for ancestor in self.inputs],
        }

    def walk(self) -> Iterator[Ancestor]:
        """This result and everything it was made from."""
        yield self
        for ancestor in self.inputs:
            yield from ancestor.walk()


def trace(path: Path) -> list[Ancestor]:
    """The ancestry of a stage folder, its `model/`, or every final stage of a run's folder.

    Raises ArtifactError when no finished stage is found at `path`.
    """
    folder = path.resolve()
    if folder.name == "model" and (folder.parent / RECORD).exists():
        folder = folder.parent
    verified: dict[Path, str | None] = {}
    if (folder / RECORD).exists():
        return [_ancestor("", folder, verified)]
    records = [record for child in sorted(folder.glob("*/")) if (record := newest_record(child))]
    consumed = {value["fingerprint"] for record in records for value in record["inputs"].values()}
    final = [record for record in records if record["fingerprint"] not in consumed]
    if not final:
        raise ArtifactError(f"{path}: no finished stage here; give a stage's folder, its model/, or a run's folder")
    return [_ancestor("", folder / record["stage"] / record["fingerprint"][:8], verified) for record in final]


def _ancestor(slot: str, folder: Path, verified: dict[Path, str | None]) -> Ancestor:
    record = read_record(folder)
    if record is None:
        raise ArtifactError(f"{folder / RECORD}: not readable, or written by a newer align")
    if folder not in verified:
        verified[folder] = _damage(folder / "model", record)
    inputs = []
    for name, value in record["inputs"].items():
        made_in = _find(folder, value)
        if made_in is None:
            inputs.append(Ancestor(name, value["source"], value["path"], value["fingerprint"]))
        else:
            inputs.append(_ancestor(name, made_in, verified))
    return Ancestor(slot, record["stage"], str(folder), record["fingerprint"], record, verified[folder], inputs)


def _find(consumer: Path, value: dict[str, Any]) -> Path | None:
    """The stage folder an input came from: in the same run, which may have moved, or as recorded."""
    sibling = consumer.parent.parent / value["source"] / value["fingerprint"][:8]
    for folder in (sibling, Path(value["path"]).parent):
        record = read_record(folder)
        if record is not None and record["fingerprint"] == value["fingerprint"]:
            return folder
    return None


def _damage(model: Path, record: dict[str, Any]) -> str | None:
    try:
        files = read_manifest(model, hashes=True)["files"]
    except ArtifactError as error:
        return str(error)
    return None if files == record["files"] else f"{model}: MANIFEST.json differs from record.json"
