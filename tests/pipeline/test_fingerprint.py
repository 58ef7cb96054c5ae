"""What is in a stage's identity and what is not, one case each, and how a difference is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from toy_stages import SPECS

from align.errors import ConfigError
from align.job import Job
from align.pipeline.external import HashCache
from align.pipeline.fingerprint import Contents, make_jobs
from align.pipeline.functions import module_file
from align.pipeline.graph import build_graph
from align.pipeline.reasons import changes
from align.recipe.load import load_recipe
from align.recipe.spec import StageSpec

PIN = "a" * 40


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with two data files and a gold scorer."""
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    (tmp_path / "other.jsonl").write_text(row.replace("b", "d") + "\n")
    (tmp_path / "gold.py").write_text("def score(prompts, responses): ...\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(*overrides: str, specs: Mapping[str, StageSpec] = SPECS, stage: str = "sft", run: str = "run") -> Job:
    """The job of a stage with these overrides."""
    given = ["data=rows.jsonl", f"model=org/name@{PIN}", "evaluation.gold=gold:score", *overrides]
    recipe = load_recipe(None, overrides=given, requested=[stage], specs=specs)
    nodes = build_graph(recipe, [stage])
    contents = Contents(nodes, recipe.settings.evaluation.data)
    jobs = make_jobs(recipe.settings, nodes, Path(run).resolve(), HashCache(Path()), contents)
    return next(job for job in jobs if job.stage == stage)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sft.lr=0.2", "lr: 0.1 -> 0.2"),
        ("seed=1", "seed: 0 -> 1"),
        ("sft.seed=1", "seed: 0 -> 1"),
        ("data=other.jsonl", "data: content changed"),
        ("data.held_out=0.2", "data.held_out: 0.1 -> 0.2"),
        ("evaluation.prompts=3", "evaluation.prompts: 256 -> 3"),
        ("evaluation.gold=null", "evaluation.gold: gold:score -> none"),
        ("evaluation.data=other.jsonl", "evaluation.data: added"),
        (f"model=org/name@{'b' * 40}", "input policy (org/name): changed"),
        (f"model=org/else@{PIN}", "input policy (org/else): changed"),
    ],
)
def test_what_can_change_the_result_changes_the_fingerprint(here: Path, override: str, reason: str) -> None:
    before, after = job(), job(override)
    assert before.fingerprint != after.fingerprint
    sources = {slot: value.source for slot, value in after.inputs.items()}
    assert changes(before.identity, after.identity, sources)[0].startswith(reason)


def test_a_mixture_counts_by_content_and_weights(here: Path) -> None:
    """Where its files lie, and which of a folder were chosen by `files`, does not count; its weights do."""
    (here / "folder").mkdir()
    (here / "folder" / "copy.jsonl").write_bytes((here / "rows.jsonl").read_bytes())
    parts = "{{mixture: {{a: {{{}, weight: {}}}, b: {{path: other.jsonl, weight: 1}}}}}}"
    before = job("data=" + parts.format("path: rows.jsonl", 2))
    assert job("data=" + parts.format("path: folder, files: copy.jsonl", 2)).fingerprint == before.fingerprint
    after = job("data=" + parts.format("path: rows.jsonl", 3))
    assert changes(before.identity, after.identity, {}) == ["data.mixture.a.weight: 2.0 -> 3.0"]


def test_a_new_version_of_the_stage_changes_the_fingerprint(here: Path) -> None:
    newer = {**SPECS, "sft": dataclasses.replace(SPECS["sft"], version=2)}
    before, after = job(), job(specs=newer)
    assert before.fingerprint != after.fingerprint
    assert changes(before.identity, after.identity, {}) == ["the stage itself changed: version 1 -> 2"]


def test_editing_the_gold_scorer_changes_the_fingerprint(here: Path) -> None:
    before = job()
    (here / "gold.py").write_text("def score(prompts, responses): return []\n")
    after = job()
    assert before.fingerprint != after.fingerprint
    (reason,) = changes(before.identity, after.identity, {})
    assert reason.startswith("evaluation.gold: source changed (")


@pytest.mark.parametrize(
    "override", ["sft.log_every=7", "track=[tensorboard]", "name=else", "sft.seed=0", "data=moved.jsonl"]
)
def test_what_cannot_change_the_result_does_not(here: Path, override: str) -> None:
    (here / "moved.jsonl").write_text((here / "rows.jsonl").read_text())
    assert job().fingerprint == job(override).fingerprint
    assert job().fingerprint == job(override, run="elsewhere/run").fingerprint


def test_data_given_to_the_stage_or_to_the_recipe_is_the_same(here: Path) -> None:
    assert job().fingerprint == job("data=other.jsonl", "sft.data=rows.jsonl").fingerprint


def test_a_job_is_complete(here: Path) -> None:
    made = job("seed=4")
    assert made.config["seed"] == 4
    assert made.config["data"]["path"] == str(here / "rows.jsonl")
    assert made.inputs["policy"].path == "org/name"
    assert made.inputs["policy"].revision == PIN
    assert Path(made.directory) == here / "run" / "sft" / made.fingerprint[:8]


def test_an_unpinned_hub_id_is_refused_offline(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="org/name is not pinned to a commit"):
        job("model=org/name")


def test_a_gold_module_is_found_without_being_imported(here: Path) -> None:
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").write_text("raise RuntimeError('imported')")
    (here / "pack" / "inner.py").write_text("raise RuntimeError('imported')")
    assert module_file("pack.inner", "here") == here / "pack" / "inner.py"
    assert module_file("align.records", "here").name == "records.py"
    (here / "bare" / "deeper").mkdir(parents=True)
    (here / "bare" / "deeper" / "leaf.py").touch()
    assert module_file("bare.deeper.leaf", "here") == here / "bare" / "deeper" / "leaf.py"
    with pytest.raises(ConfigError, match=r"no module 'pack\.none'"):
        module_file("pack.none", "here")
    with pytest.raises(ConfigError, match="no module 'nowhere'"):
        module_file("nowhere", "here")
