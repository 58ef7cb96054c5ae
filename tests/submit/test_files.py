"""The files that `align submit` writes: golden ones for every engine, and what holds for ugly names in all of them.

`ALIGN_REMAKE_GOLDEN=1 pytest tests/submit/test_files.py` writes the golden files anew, to be read in the diff.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import UGLY
from hypothesis import given
from hypothesis import strategies as st

from align.errors import ConfigError
from align.recipe.submit_settings import SubmitSettings
from align.submit.submission import StageJob, Submission, read_submission, reduced, slug, write_files
from align.submit.targets import TARGETS, TargetName
from align.submit.yaml_text import to_yaml

GOLDEN = Path(__file__).parents[1] / "golden" / "submit"
COMMON: dict[str, Any] = {
    "gpus": 8,
    "gpu_type": "h100",
    "cpus": 64,
    "memory": 512,
    "hours": 12.5,
    "setup": ["module load cuda", "source .venv/bin/activate"],
    "env": {"HF_HUB_OFFLINE": "1", "NOTE": "it's $HOME"},
    "python": "python3",
}
PPO_ON_TWO = {"stages": {"ppo": {"nodes": 2}}}
CASES: dict[str, tuple[TargetName, dict[str, Any]]] = {
    "slurm": (
        TargetName.SLURM,
        PPO_ON_TWO
        | {
            "slurm": {
                "partition": "gpu",
                "account": "lab",
                "qos": "long",
                "options": ["--exclusive", "--mail-type=FAIL"],
            }
        },
    ),
    "slurm_container": (
        TargetName.SLURM,
        {"slurm": {"image": "registry#team/align:1", "mounts": ["/data:/data"], "requeue": False}},
    ),
    "kubernetes": (
        TargetName.KUBERNETES,
        PPO_ON_TWO
        | {
            "kubernetes": {
                "image": "team/align:1",
                "volume": "shared",
                "namespace": "lab",
                "shared_memory": 64,
                "secrets": ["hub"],
                "pod": {"nodeSelector": {"gpu": "h100"}},
            }
        },
    ),
    "skypilot": (
        TargetName.SKYPILOT,
        PPO_ON_TWO
        | {
            "gpu_type": "H100",
            "skypilot": {
                "infra": "aws",
                "spot": True,
                "mounts": {"/results": "s3://lab-results"},
                "secrets": ["HF_TOKEN"],
                "resources": {"disk_size": 512},
            },
        },
    ),
    "ray": (TargetName.RAY, {"ray": {"address": "http://head:8265", "options": ["--verify=false"]}}),
    "script": (TargetName.SCRIPT, {"gpus": 1}),
}


def submission(target: TargetName, settings: dict[str, Any], project: str = "/shared/project") -> Submission:
    """Base, then sft, then reward and dpo beside each other, then ppo."""
    asked = SubmitSettings.model_validate(settings)
    after = {"base": [], "sft": ["base"], "reward": ["sft"], "dpo": ["sft"], "ppo": ["reward"]}
    runs = f"{project}/runs/demo"
    return Submission(
        target=target,
        name="demo-20260102-030405",
        run="demo",
        folder=Path(f"{runs}/submit/20260102-030405-{target}"),
        here=Path(project),
        arguments=["dpo", "ppo", "-c", "align.yaml", "--run", "demo", "--runs", "runs", "ppo.kl.coef=0.1"],
        jobs=[
            StageJob(name, needs, f"{runs}/{name}/12345678", asked.of(name), None if name in {"base", "ppo"} else "ddp")
            for name, needs in after.items()
        ],
        settings=asked,
    )


def files(target: TargetName, settings: dict[str, Any], project: str = "/shared/project") -> dict[str, str]:
    return TARGETS[target].render(submission(target, settings, project))


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    """Every file, to the letter."""
    target, settings = CASES[case]
    made = files(target, COMMON | settings)
    if os.environ.get("ALIGN_REMAKE_GOLDEN"):
        for path in (GOLDEN / case).glob("*"):
            path.unlink()
        (GOLDEN / case).mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            (GOLDEN / case / name).write_text(text, encoding="utf-8")
    assert made == {path.name: path.read_text(encoding="utf-8") for path in (GOLDEN / case).iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_every_script_is_shell(case: str) -> None:
    """`bash -n` of each, and of those inside YAML, with the ugliest names that the target takes."""
    target, settings = CASES[case]
    ugly = {} if target is TargetName.RAY else {"project": f"/shared/{UGLY}"}
    made = files(target, COMMON | settings | {"env": {"NOTE": UGLY}, "python": UGLY}, **ugly)
    for name, text in made.items():
        for script in scripts(text) if name.endswith(".yaml") else [text]:
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def scripts(text: str) -> list[str]:
    """The scripts of a JobSet or a pipeline."""
    first, *tasks = yaml.safe_load_all(text)
    if tasks:
        return [task["run"] for task in tasks]
    jobs = first["spec"]["replicatedJobs"]
    return [pod(job)["containers"][0]["command"][2] for job in jobs]


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["template"]["spec"]["template"]["spec"]


def test_what_is_substituted_arrives_as_it_is(tmp_path: Path) -> None:
    """A job's script is run with a Python that prints what it gets: names with quotes, commands and line breaks."""
    program = tmp_path / f"{UGLY} printer"
    program.write_text('#!/bin/bash\nprintf "%s\\0" "$NOTE" "$PWD" "$@"\n')
    program.chmod(0o755)
    made = submission(TargetName.SCRIPT, {"python": str(program), "env": {"NOTE": UGLY}, "gpus": 0}, str(tmp_path))
    made = replace(made, arguments=["ppo", f"ppo.data={UGLY}"])
    script = TARGETS[TargetName.SCRIPT].render(made)["run.sh"]
    done = subprocess.run(["bash", "-c", script], cwd="/", capture_output=True, text=True, check=True)
    expected = [UGLY, str(tmp_path), "-m", "align", "run", "ppo", f"ppo.data={UGLY}"]
    assert done.stdout.split("\0")[:-1] == expected
    assert [path.name for path in tmp_path.iterdir()] == [program.name]


def test_several_machines_get_one_launcher_each_that_knows_its_rank() -> None:
    """2 nodes with 8 processes each are 16 in all; one node alone needs no rank, and a stage that trains in one process
    gets no more."""
    made = files(TargetName.SLURM, COMMON | {"stages": {"sft": {"nodes": 2}}})
    words = shlex.split(made["sft.sh"].splitlines()[-1])
    assert words[words.index("--only") + 1 :] == [
        "sft",
        *("nodes.count=2", "nodes.rank=$NODE_RANK", "nodes.address=$MASTER_ADDR", "nodes.port=$MASTER_PORT"),
    ]
    assert {"sft.launch.processes=16", "sft.launch.strategy=ddp"} < set(words)
    assert 'export NODE_RANK="$SLURM_NODEID"' in made["sft.sh"]
    assert "reward.launch.processes=8" in made["reward.sh"] and "nodes.rank" not in made["reward.sh"]
    assert "launch" not in made["ppo.sh"].splitlines()[-1]


def test_the_first_machine_of_skypilot_is_the_meeting_point() -> None:
    """SKYPILOT_NODE_IPS has an address per line."""
    script = scripts(files(TargetName.SKYPILOT, COMMON | PPO_ON_TWO)["pipeline.yaml"])[-1]
    lines = [line for line in script.splitlines() if line.startswith("export ") and "SKYPILOT" in line]
    show = "\n".join([*lines, 'echo "$NODE_RANK $MASTER_ADDR $MASTER_PORT"'])
    machine = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(["bash", "-c", show], env=machine, capture_output=True, text=True, check=True)
    assert done.stdout == "1 10.0.0.7 29500\n"


def test_a_jobset_has_what_its_api_requires() -> None:
    """Required fields and limits of jobset.x-k8s.io/v1alpha2 and batch/v1: names, the order of dependencies, and what a
    podFailurePolicy demands of the rest."""
    made = yaml.safe_load(files(TargetName.KUBERNETES, COMMON | CASES["kubernetes"][1])["jobset.yaml"])
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    jobs = made["spec"]["replicatedJobs"]
    names = [job["name"] for job in jobs]
    assert len(set(names)) == len(names)
    for place, job in enumerate(jobs):
        assert all(wait["name"] in names[:place] and wait["status"] == "Complete" for wait in job.get("dependsOn", []))
        spec = job["template"]["spec"]
        longest = f"{made['metadata']['name']}-{job['name']}-0-{spec['completions'] - 1}-abcde"
        assert len(longest) <= 63
        assert spec["completions"] == spec["parallelism"]
        assert spec["completionMode"] == "Indexed"
        assert spec["podReplacementPolicy"] == "Failed"
        assert pod(job)["restartPolicy"] == "Never"
        (container,) = pod(job)["containers"]
        assert {"name", "image", "command"} <= container.keys()
        assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod(job)["volumes"]}
        for rule in spec["podFailurePolicy"]["rules"]:
            assert rule["action"] in {"Ignore", "FailJob"}
            assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
            codes = rule.get("onExitCodes", {"containerName": container["name"], "values": [1]})
            assert codes["containerName"] == container["name"]
            assert codes["values"] == sorted(set(codes["values"]))
            assert 0 not in codes["values"]
    assert "dependsOn" not in jobs[0]
    assert [wait["name"] for wait in jobs[-1]["dependsOn"]] == ["reward-3"]


def test_a_pipeline_has_only_fields_of_skypilot() -> None:
    """Those of its schemas of tasks, resources and storage (0.14); each task is recovered when it saved and stopped."""
    head, *tasks = yaml.safe_load_all(files(TargetName.SKYPILOT, COMMON | CASES["skypilot"][1])["pipeline.yaml"])
    assert head == {"name": "demo-20260102-030405"}
    for task in tasks:
        assert task.keys() <= {"name", "resources", "num_nodes", "workdir", "secrets", "file_mounts", "volumes", "run"}
        resources = task["resources"]
        known = {"infra", "accelerators", "cpus", "memory", "use_spot", "image_id", "job_recovery", "disk_size"}
        assert resources.keys() <= known
        assert resources["job_recovery"] == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]}
        assert all(mount.keys() == {"source", "mode"} for mount in task["file_mounts"].values())
    assert [task["num_nodes"] for task in tasks] == [1, 1, 1, 1, 2]


@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_yaml_is_read_back_as_it_was(value: Any) -> None:
    """Any text: line breaks, quotes, colons, what looks like a number."""
    assert yaml.safe_load(to_yaml({"value": value}))["value"] == value


@given(st.text(), st.integers(min_value=8, max_value=40))
def test_a_slug_is_a_name_for_every_engine(text: str, longest: int) -> None:
    """RFC 1035: a letter, then letters, digits and hyphens, no hyphen at the end."""
    name = slug(text, longest)
    assert len(name) <= longest
    assert name[0].isalpha() and name.isascii() and name == name.lower()
    assert all(part.isalnum() for part in name.split("-"))


def test_what_a_longer_path_implies_is_left_out() -> None:
    needs = {"base": [], "sft": ["base"], "a": ["sft", "base"], "b": ["sft"], "ppo": ["sft", "a", "b"]}
    assert reduced(needs) == {"base": [], "sft": ["base"], "a": ["sft"], "b": ["sft"], "ppo": ["a", "b"]}


def test_a_submission_is_read_back_and_never_overwritten(tmp_path: Path) -> None:
    made = replace(submission(TargetName.SLURM, COMMON | CASES["slurm"][1]), folder=tmp_path / "new")
    write_files(made, {"submit.sh": "true\n"})
    assert read_submission(made.folder) == made
    assert json.loads((made.folder / "submission.json").read_text())["target"] == "slurm"
    with pytest.raises(ConfigError, match="run the command again"):
        write_files(made, {})


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        (TargetName.KUBERNETES, {}, "submit.kubernetes.image: required for --to kubernetes"),
        (TargetName.SKYPILOT, {}, "submit.gpu_type: required for --to skypilot"),
        (TargetName.RAY, {"nodes": 2}, "a Ray job runs on one machine"),
        (TargetName.SCRIPT, {"nodes": 2}, "the script runs on this machine alone"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(target: TargetName, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        files(target, settings)


def test_a_path_that_ray_would_change_is_refused() -> None:
    with pytest.raises(ConfigError, match="use --run and --runs with a plain path"):
        files(TargetName.RAY, {}, project=f"/shared/{UGLY}")
