"""Kubernetes: a JobSet with a Job per stage, each created when those it consumes are complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from align.errors import ArtifactError, ConfigError, DataError, Interrupted, NumericError, Problem
from align.submit.command import PORT, job_script, keep_id, submit_script
from align.submit.engine import JobState, State, ask
from align.submit.submission import StageJob, Submission, slug
from align.submit.yaml_text import to_yaml

MANIFEST = "jobset.yaml"
HOPELESS = (ConfigError.exit_code, DataError.exit_code, ArtifactError.exit_code, NumericError.exit_code)
"""Exit codes that another try gives again."""

LAST_CONDITIONS = {"Completed": State.DONE, "Failed": State.FAILED}
REQUIRED = "required for --to kubernetes"


def render_kubernetes(submission: Submission) -> dict[str, str]:
    """The JobSet."""
    settings = submission.settings.kubernetes
    missing = [name for name in ("image", "volume") if not getattr(settings, name)]
    if missing:
        raise ConfigError([Problem(f"submit.kubernetes.{name}", REQUIRED) for name in missing])
    namespace = {"namespace": settings.namespace} if settings.namespace else {}
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": submission.name, **namespace},
        "spec": {"replicatedJobs": [_replicated(submission, job) for job in submission.jobs]},
    }
    commands = [
        f"kubectl create -f {MANIFEST}",
        *keep_id(submission.stages, submission.name),
    ]
    return {MANIFEST: to_yaml(manifest), "submit.sh": submit_script(commands)}


def kubernetes_states(submission: Submission, ids: Mapping[str, str]) -> dict[str, JobState]:
    """From the JobSet's status."""
    namespace = submission.settings.kubernetes.namespace
    options = [f"--namespace={namespace}"] if namespace else []
    text = ask(["kubectl", "get", "jobset", submission.name, "--output=json", *options])
    status = json.loads(text).get("status", {}) if text else None
    return {stage: _state(status, job_name(submission, stage)) for stage in ids}


def job_name(submission: Submission, stage: str) -> str:
    """Name of a stage's Job inside the set: numbered, because two stages may have one slug."""
    return f"{slug(stage, 12)}-{submission.stages.index(stage) + 1}"


def _state(status: Mapping[str, Any] | None, name: str) -> JobState:
    if status is None:
        return JobState(State.UNKNOWN)
    jobs = {one["name"]: one for one in status.get("replicatedJobsStatus", [])}
    counts = {key: number for key, number in jobs.get(name, {}).items() if isinstance(number, int) and number}
    if counts.get("succeeded"):
        return JobState(State.DONE, "succeeded")
    if counts.get("failed"):
        return JobState(State.FAILED, "failed")
    if counts.get("ready"):
        return JobState(State.RUNNING, "ready")
    ended = [one["type"] for one in status.get("conditions", []) if one["status"] == "True"]
    last = next((LAST_CONDITIONS[one] for one in ended if one in LAST_CONDITIONS), State.WAITING)
    return JobState(last, "its pods are pending" if counts.get("active") else "not created yet")


def _replicated(submission: Submission, job: StageJob) -> dict[str, Any]:
    waits = [{"name": job_name(submission, stage), "status": "Complete"} for stage in job.after]
    return {
        "name": job_name(submission, job.stage),
        "replicas": 1,
        **({"dependsOn": waits} if waits else {}),
        "template": {"spec": _job(submission, job)},
    }


def _job(submission: Submission, job: StageJob) -> dict[str, Any]:
    nodes = job.resources.nodes
    return {
        "completions": nodes,
        "parallelism": nodes,
        "completionMode": "Indexed",
        "backoffLimit": submission.settings.kubernetes.retries,
        "podReplacementPolicy": "Failed",  # a pod that is still saving holds the run
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                _on_exit("Ignore", Interrupted.exit_code),
                _on_exit("FailJob", *HOPELESS),
            ]
        },
        "template": {"spec": _pod(submission, job)},
    }


def _on_exit(action: str, *codes: int) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"containerName": "align", "operator": "In", "values": sorted(codes)}}


def _pod(submission: Submission, job: StageJob) -> dict[str, Any]:
    settings = submission.settings.kubernetes
    first = f"{submission.name}-{job_name(submission, job.stage)}-0-0.{submission.name}"
    meeting = [
        'export NODE_RANK="$JOB_COMPLETION_INDEX"',
        f"export MASTER_ADDR={first} MASTER_PORT={PORT}",
    ]
    script = job_script(submission, [job], directory=settings.mount, shares_files=False, meeting=meeting)
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{settings.shared_memory}Gi"}}
    mounts = [{"name": "workspace", "mountPath": settings.mount}]
    volumes = [{"name": "workspace", "persistentVolumeClaim": {"claimName": settings.volume}}]
    if settings.shared_memory:
        mounts.append({"name": memory["name"], "mountPath": "/dev/shm"})
        volumes.append(memory)
    container = {
        "name": "align",
        "image": settings.image,
        "command": ["bash", "-c", script],
        "resources": _resources(job),
        "volumeMounts": mounts,
        **({"envFrom": [{"secretRef": {"name": name}} for name in settings.secrets]} if settings.secrets else {}),
    }
    limit = {"activeDeadlineSeconds": round(job.resources.hours * 3600)} if job.resources.hours else {}
    return {
        **settings.pod,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": submission.settings.grace,
        **limit,
        "containers": [container],
        "volumes": [*volumes, *settings.pod.get("volumes", [])],
    }


def _resources(job: StageJob) -> dict[str, dict[str, Any]]:
    asked = {
        "cpu": job.resources.cpus,
        "memory": f"{job.resources.memory}Gi" if job.resources.memory else None,
        "nvidia.com/gpu": job.resources.gpus or None,
    }
    given = {name: value for name, value in asked.items() if value}
    return {"requests": given, "limits": {name: value for name, value in given.items() if name != "cpu"}}
