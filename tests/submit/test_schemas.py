"""What `align submit` writes against what the engines publish of their formats.

Kubernetes: kubeflow-trainer-api has pydantic models made from the OpenAPI documents of JobSet and of the core objects.
A model takes what it knows and drops what it does not, so a manifest that comes back whole has known fields only.

SkyPilot: the schemas of tasks are in `skypilot` alone (sky.utils.schemas), which loads its whole client and wants
another version of click than this project's closed set. In an environment of its own, SkyPilot 0.14.1 loads the golden
pipeline (sky.utils.dag_utils.load_chain_dag_from_yaml); here test_files.py looks at its fields.

Ray's jobs are command lines and Slurm's are scripts: neither has a schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from test_files import CASES, COMMON, files

from align.submit.targets import TargetName

Manifest = dict[str, Any]


def job(manifest: Manifest) -> Manifest:
    return manifest["spec"]["replicatedJobs"][-1]["template"]["spec"]


def jobset(settings: dict[str, Any]) -> Manifest:
    return yaml.safe_load(files(TargetName.KUBERNETES, settings)["jobset.yaml"])


def fits(manifest: Manifest) -> bool:
    """Whether all its fields are known, of the right type, and those that are required are there."""
    try:
        known = JobsetV1alpha2JobSet.from_dict(manifest)
    except ValueError:
        return False
    return known is not None and known.to_dict() == manifest


GIVEN = CASES["kubernetes"][1]
FEWEST = {"gpus": 0, "kubernetes": {"image": "team/align:1", "volume": "shared"}}


@pytest.mark.parametrize("settings", [COMMON | GIVEN, FEWEST])
def test_a_jobset_fits_the_published_schema(settings: dict[str, Any]) -> None:
    assert fits(jobset(settings))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: job(manifest).update(backofLimit=3),
        lambda manifest: job(manifest).update(backoffLimit="three"),
        lambda manifest: job(manifest)["podFailurePolicy"]["rules"][0].update(onExitCode={}),
        lambda manifest: job(manifest)["podFailurePolicy"]["rules"][1]["onExitCodes"].pop("operator"),
        lambda manifest: job(manifest)["template"]["spec"]["containers"][0].pop("name"),
        lambda manifest: job(manifest)["template"]["spec"]["containers"][0].update(volumeMount=[]),
    ],
)
def test_what_does_not_fit_is_found(spoil: Callable[[Manifest], None]) -> None:
    """Unknown fields, a wrong type, and required fields that are missing, at every depth."""
    manifest = jobset(COMMON | GIVEN)
    spoil(manifest)
    assert not fits(manifest)
