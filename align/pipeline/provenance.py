"""What a stage's record says: what the artifact was made of, by which versions, when, on which machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.job import StageResult
from align.pipeline.folders import RECORD_SCHEMA, Order
from align.records import read_manifest

PACKAGES = (
    "align-rlhf",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "vllm",
)


def record_of(
    order: Order, result: StageResult, contents: dict[str, str | None], started: float, peaks: list[dict[str, int]]
) -> dict[str, Any]:
    """What record.json says of a stage that ends now: what it was made of (`contents`: of its inputs, taken before they
    were read), what it made, when, on what; `peaks` is the memory of each process."""
    job, ended = order.job, time.time()
    model = Path(job.directory) / "model"
    return {
        "schema": RECORD_SCHEMA,
        "stage": job.stage,
        "kind": job.kind,
        "version": job.version,
        "output": order.output,
        "fingerprint": job.fingerprint,
        "identity": job.identity,
        "inputs": {slot: {**asdict(value), "content": contents[slot]} for slot, value in job.inputs.items()},
        "config": job.config,
        "evaluation": job.evaluation,
        "data": (job.identity["data"] or {}).get("content"),
        "data_reports": job.data_reports,
        "seed": job.seed,
        "metrics": _plain(result.metrics),
        "handover": _plain(result.handover),
        "files": read_manifest(model)["files"],
        "started": timestamp(started),
        "ended": timestamp(ended),
        "seconds": round(ended - started, 3),
        "versions": {"python": platform.python_version(), **installed(PACKAGES)},
        "hardware": _hardware(),
        "peak_memory": {name: max(peak.get(name, 0) for peak in peaks) for name in peaks[0]},
        "world_size": len(peaks),
        "git": _git_commit(),
        "command": order.command,
    }


def _plain(value: Any) -> Any:
    """The value as strict JSON: NaN and infinities become "NaN", "Infinity" and "-Infinity", never hidden."""
    return json.loads(json.dumps(value), parse_constant=str)


def timestamp(seconds: float) -> str:
    """A time of `time.time()` as records and logs write it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _hardware() -> dict[str, Any]:
    torch = sys.modules.get("torch")  # a stage that did not need it is not made to import it
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch else []
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus}


def peak_memory() -> dict[str, int]:
    """Most bytes this process ever held: resident in main memory, and allocated on each GPU by torch."""
    unit = 1 if sys.platform == "darwin" else 1024
    torch = sys.modules.get("torch")
    gpus = (
        {f"gpu{index}": torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
        if torch
        else {}
    )
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, **gpus}


def _git_commit() -> str | None:
    """Commit of align's own checkout, with `+changes` if files differ; None when installed as a package."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(["git", "-C", checkout, *command], capture_output=True, text=True, timeout=10, check=True)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "align", "stages"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
