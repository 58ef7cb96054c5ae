"""Reading and writing the small files of a stage's folder: job.json, record.json, failure.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.errors import ArtifactError
from align.job import Input, Job
from align.records import fingerprint, read_manifest, write_json

JOB = "job.json"
RECORD = "record.json"
FAILURE = "failure.json"
LOG = "log.txt"
RECORD_SCHEMA = 1


@dataclass(frozen=True)
class Order:
    """What a worker is told: the job, and by name the code that does it."""

    job: Job
    run: str
    """`package.module:function` of the stage."""
    config_class: str
    """`package.module:Class` that job.config is validated with."""
    output: str
    """Kind of the artifact."""
    command: list[str]
    """The command line that started the run."""


def write_order(order: Order) -> None:
    """Writes job.json."""
    write_json(Path(order.job.directory) / JOB, asdict(order))


def read_order(directory: Path) -> Order:
    """Reads job.json."""
    try:
        fields = json.loads((directory / JOB).read_text(encoding="utf-8"))
        job = fields["job"]
        inputs = {slot: Input(**value) for slot, value in job["inputs"].items()}
        return Order(**{**fields, "job": Job(**{**job, "inputs": inputs})})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{directory / JOB}: not a readable job: {error}") from error


def read_record(directory: Path) -> dict[str, Any] | None:
    """record.json of a stage folder; None when the stage is not complete."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("schema", 0) > RECORD_SCHEMA:
        return None
    return record


def newest_record(stage_folder: Path) -> dict[str, Any] | None:
    """The record of a stage that was completed last, whatever its fingerprint."""
    records = [record for path in stage_folder.glob(f"*/{RECORD}") if (record := read_record(path.parent))]
    return max(records, key=lambda record: record["ended"], default=None)


def newest_checkpoint(directory: Path) -> int | None:
    """Step of the newest checkpoint; None without one. The stage verifies it when it resumes."""
    names = [path.name for path in (directory / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=None)


def content(model: Path) -> str | None:
    """One hash for the files of a model, from its manifest; None without a manifest that agrees."""
    try:
        return fingerprint(read_manifest(model)["files"])
    except ArtifactError:
        return None


def write_failure(directory: Path, exit_code: int, message: str) -> bool:
    """Keeps the exit code of the stage's first process to fail: launchers turn every code into 1. Returns whether this
    is news: False when another process was first."""
    try:
        with (directory / FAILURE).open("x", encoding="utf-8") as stream:
            json.dump({"exit_code": exit_code, "message": message}, stream)
    except FileExistsError:
        return False
    except OSError:
        return True  # the disk is full: stderr has the message
    return True


def read_failure(directory: Path) -> int | None:
    """The exit code kept by `write_failure`; None when no process of the stage got to say."""
    try:
        return int(json.loads((directory / FAILURE).read_text(encoding="utf-8"))["exit_code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_failure_message(directory: Path) -> str:
    """The last line kept by `write_failure`: of a traceback that is the error. Empty when there is none."""
    try:
        message = str(json.loads((directory / FAILURE).read_text(encoding="utf-8"))["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return message.strip().rpartition("\n")[2]
