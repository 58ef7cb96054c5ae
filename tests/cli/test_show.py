"""`align show`: stages, documentation, and the results of a run."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from align.cli import app
from align.errors import ArtifactError, ConfigError
from stages import KINDS


def show(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["show", *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run named `first`, in the runs folder of the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    summary = {"stages": {"sft": {"gold": 0.4123, "gold_ci95": [0.39, 0.43]}, "reward": {"accuracy": 0.83}}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def test_lists_the_kinds():
    output = show()
    assert all(kind in output for kind in KINDS)
    assert list(json.loads(show("--json"))) == [*KINDS, "recipe"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_documented(kind):
    assert f"\n{kind}.seed  whole number or null  = null\n" in show(kind)


def test_a_setting_has_type_default_and_documentation():
    output = show("ppo")
    assert "ppo.kl.coef  number, at least 0  = 0.05\n    Weight beta of the KL." in output
    assert "ppo.precision  auto | float32 | bfloat16 | float16  = auto" in output
    assert "ppo.optim.betas  list of 2 (number, at least 0, at most 1)  = [0.9, 0.999]" in output
    assert "ppo.data.path  text or list of (text) or null  = null" in output
    assert "model.path  text  = (required)" in show("recipe")
    assert "ppo.optim.lr  number, over 0  = 3e-06" in output


def test_settings_under_a_name_of_the_recipes_choice_are_documented_once():
    output = show("ppo")
    assert "\nppo.reward  settings by name\n" in output
    assert "\nppo.reward.<name>.weight  number  = 1.0\n" in output


def test_a_kind_shows_its_own_defaults():
    """grpo shares its folder with ppo, not its estimator nor its KL."""
    output = show("grpo")
    assert "\ngrpo.estimator  grpo  = grpo\n" in output
    assert "\ngrpo.kl.estimator  k1 | k2  = k2\n" in output


def test_settings_that_never_rerun_anything_say_so():
    assert "ppo.checkpoint.keep  whole number, at least 1  = 2  cannot change the result\n" in show("ppo")


def test_the_recipes_own_settings():
    assert "\nseed  whole number, at least 0  = 0\n" in show("recipe")


def test_json_is_a_schema_with_documentation():
    schema = json.loads(show("ppo", "--json"))
    assert schema["properties"]["rollouts"] == {
        "default": 200,
        "description": "Number of sample-and-improve rounds.",
        "exclusiveMinimum": 0,
        "title": "Rollouts",
        "type": "integer",
    }


@pytest.mark.parametrize("name", ["first", "runs/first"])
def test_a_run_by_name_or_folder(run, name):
    output = show(name)
    assert "sft" in output and "0.412" in output and "0.830" in output
    assert json.loads(show(name, "--json"))["stages"]["reward"] == {"accuracy": 0.83}


def test_a_folder_of_the_same_name_does_not_hide_a_run(run):
    (run.parents[1] / "first").mkdir()
    assert "sft" in show("first")


def test_a_run_in_another_runs_folder(run):
    run.parent.rename("elsewhere")
    assert "sft" in show("first", "--runs", "elsewhere")


def test_unknown_names_the_nearest(run):
    with pytest.raises(
        ConfigError, match=r"^fist: neither a stage kind nor a run in runs/ \(did you mean `first`\?\)$"
    ):
        show("fist")


def test_a_run_without_results(run):
    (run / "summary.json").unlink()
    with pytest.raises(ArtifactError, match="no stage of this run is finished"):
        show("first")
    (run / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="cannot be read"):
        show("first")
