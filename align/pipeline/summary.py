"""runs/<run>/summary.json: the final metrics of every stage whose result belongs to the same chain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.pipeline.folders import newest_record, read_record
from align.pipeline.plan import Plan
from align.records import write_json

SUMMARY = "summary.json"


def write_summary(plan: Plan) -> dict[str, Any]:
    """Writes summary.json from the records of the plan's stages, and returns it.

    Stages of earlier commands in the same run are kept while they were made from the same artifacts: `align
    run dpo` after `align run ppo` shows both, but a PPO made from an SFT that has changed since is left out.
    """
    records = {step.job.stage: read_record(Path(step.job.directory)) for step in plan.steps}
    current = {name: record for name, record in records.items() if record is not None}
    planned = {step.job.stage: step.job.fingerprint for step in plan.steps}
    for record in _earlier(plan.run_dir, planned):
        if _agrees(record, planned):
            planned[record["stage"]] = record["fingerprint"]
            current[record["stage"]] = record
    order = list(plan.recipe.stages)
    names = sorted(current, key=lambda name: (order.index(name) if name in order else len(order), name))
    summary = {
        "run": plan.run_dir.name,
        "recipe": str(plan.recipe.path) if plan.recipe.path else None,
        "stages": {name: current[name]["metrics"] for name in names},
        "data": {name: reports for name in names if (reports := current[name].get("data_reports"))},
    }
    write_json(plan.run_dir / SUMMARY, summary)
    return summary


def _earlier(run_dir: Path, planned: Mapping[str, str]) -> list[dict[str, Any]]:
    """Newest records of stages outside the plan, oldest first, so that inputs come before their users."""
    folders = [path for path in run_dir.iterdir() if path.is_dir() and path.name not in planned]
    records = [record for folder in folders if (record := newest_record(folder))]
    return sorted(records, key=lambda record: record["ended"])


def _agrees(record: Mapping[str, Any], planned: Mapping[str, str]) -> bool:
    inputs = record["inputs"].values()
    return all(value["fingerprint"] == planned.get(value["source"], value["fingerprint"]) for value in inputs)
