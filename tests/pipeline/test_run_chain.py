"""Running, reusing and re-running chains, in real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_run import RECIPE, Toy

from align.records import sha256_file

EVERYTHING = ["base", "sft", "reward", "ppo"]


def test_a_chain_runs_and_then_every_stage_is_reused(toy: Toy) -> None:
    shown = toy.align("run", "sft", "reward", "ppo")
    assert "model:   runs/toy/ppo/" in shown
    assert "align lineage runs/toy/ppo/" in shown
    summary = json.loads((toy.run_dir / "summary.json").read_text())
    assert list(summary["stages"]) == EVERYTHING
    assert summary["stages"]["ppo"] == {"gold": 0.5, "gold_ci95": [0.4, 0.6], "kl": 1.5}
    assert summary["stages"]["reward"] == {"accuracy": 0.5}
    records = {stage: sha256_file(toy.directory(stage) / "record.json") for stage in EVERYTHING}

    assert set(toy.actions().values()) == {"reuse"}
    toy.align("run")
    assert records == {stage: sha256_file(toy.directory(stage) / "record.json") for stage in EVERYTHING}


def test_the_record_says_all_that_made_the_result(toy: Toy) -> None:
    toy.align("run", "sft", "seed=7")
    folder = toy.directory("sft")
    record = json.loads((folder / "record.json").read_text())
    base = json.loads((toy.directory("base") / "record.json").read_text())
    assert record["fingerprint"].startswith(folder.name)
    assert record["inputs"]["policy"]["fingerprint"] == base["fingerprint"]
    assert record["inputs"]["policy"]["source"] == "base"
    assert record["output"] == "policy"
    assert record["seed"] == 7
    assert record["config"]["data"]["path"] == str(toy.folder / "rows.jsonl")
    assert record["data"] == record["identity"]["data"]["content"]
    weights = folder / "model" / "model.safetensors"
    assert record["files"]["model.safetensors"]["sha256"] == sha256_file(weights)
    assert record["command"][1:] == ["run", "sft", "seed=7"]
    assert record["handover"] == {"largest_difference": 0.0}
    assert {"python", "torch", "trl", "align-rlhf"} <= record["versions"].keys()
    assert record["hardware"]["cpus"]
    assert record["started"] <= record["ended"]
    assert not (folder / "checkpoints").exists()
    assert not list(toy.run_dir.rglob(".tmp-*")) + list(toy.run_dir.rglob(".trash-*"))


def test_the_resolved_recipe_asks_for_the_same_run(toy: Toy) -> None:
    toy.align("run", "ppo.lr=0.3", "seed=3")
    actions = toy.actions("-c", str(toy.run_dir / "recipe.yaml"))
    assert actions == dict.fromkeys(EVERYTHING, "reuse")


def test_a_changed_setting_re_runs_only_what_depends_on_it(toy: Toy) -> None:
    toy.align("run")
    stages = toy.plan("ppo.lr=0.2")
    assert {name: stage["action"] for name, stage in stages.items()} == {
        "base": "reuse",
        "sft": "reuse",
        "reward": "reuse",
        "ppo": "stale",
    }
    assert stages["ppo"]["reasons"] == ["lr: 0.1 -> 0.2"]

    stages = toy.plan("sft.lr=0.2")
    assert stages["reward"]["reasons"] == ["input policy (sft): changed"]
    assert stages["ppo"]["reasons"] == [
        "input policy (sft): changed",
        "input reference (sft): changed",
        "input reward (reward): changed",
    ]


def test_old_results_stay_and_are_found_again(toy: Toy) -> None:
    toy.align("run")
    toy.align("run", "ppo.lr=0.2")
    assert len(list((toy.run_dir / "ppo").iterdir())) == 2
    assert toy.actions()["ppo"] == "reuse"
    assert toy.actions("ppo.lr=0.2")["ppo"] == "reuse"


def test_settings_that_cannot_change_the_result_change_nothing(toy: Toy) -> None:
    toy.align("run", "sft")
    assert set(toy.actions("sft", "sft.log_every=5").values()) == {"reuse"}


def test_edited_data_re_runs_who_reads_it(toy: Toy) -> None:
    own = toy.folder / "prefs.jsonl"
    toy.recipe(RECIPE.replace("reward: {}", "reward: {data: prefs.jsonl}"))
    own.write_text((toy.folder / "rows.jsonl").read_text())
    toy.align("run")
    own.write_text(own.read_text().replace("good 3", "better 3"))
    stages = toy.plan()
    assert [stages[name]["action"] for name in EVERYTHING] == ["reuse", "reuse", "stale", "stale"]
    (reason,) = stages["reward"]["reasons"]
    assert reason.startswith("data: content changed (")
    assert stages["ppo"]["reasons"] == ["input reward (reward): changed"]
    moved = toy.folder / "elsewhere.jsonl"
    own.rename(moved)
    moved.write_text(moved.read_text().replace("better 3", "good 3"))
    assert set(toy.actions(f"reward.data={moved}").values()) == {"reuse"}


def test_force_runs_again_and_equal_results_stop_there(toy: Toy) -> None:
    toy.align("run")
    before = {stage: (toy.directory(stage) / "record.json").stat().st_ino for stage in EVERYTHING}
    stages = toy.plan("--force", "sft")
    assert stages["sft"]["reasons"] == ["forced"]
    assert stages["ppo"]["reasons"] == ["up to date, if sft comes out the same"]
    toy.align("run", "--force", "sft")
    after = {stage: (toy.directory(stage) / "record.json").stat().st_ino for stage in EVERYTHING}
    assert [stage for stage in EVERYTHING if before[stage] != after[stage]] == ["sft"]


def test_a_result_that_comes_out_differently_re_runs_what_was_made_from_it(toy: Toy) -> None:
    toy.align("run", "sft")
    first = json.loads((toy.directory("sft") / "record.json").read_text())["files"]
    toy.align("run", "sft", "--force", "base", TOY_DRAW="other hardware")
    second = json.loads((toy.directory("sft") / "record.json").read_text())["files"]
    assert first != second
    assert set(toy.actions("sft").values()) == {"reuse"}

    toy.align("run", "base", "--force", "base")  # alone: sft notices when it is asked for
    (reason,) = toy.plan("sft")["sft"]["reasons"]
    assert reason.startswith("input policy (base): made again with another result")
    toy.align("run", "sft")
    assert json.loads((toy.directory("sft") / "record.json").read_text())["files"] == first


def test_an_unknown_stage_to_force_is_refused(toy: Toy) -> None:
    assert "did you mean `reward`?" in toy.align("run", "--force", "rewrad", code=2)


@pytest.mark.parametrize("damage", ["cut", "gone", "same size"])
def test_a_damaged_model_is_made_again(toy: Toy, damage: str) -> None:
    toy.align("run", "sft")
    weights = toy.directory("base") / "model" / "model.safetensors"
    good = weights.read_text()
    if damage == "cut":
        weights.write_text(good[:-1])
    elif damage == "gone":
        weights.unlink()
    else:
        weights.write_text("0" * len(good))
    if damage != "same size":  # sizes are enough for `plan`; bytes are read when a stage will consume them
        stage = toy.plan("sft", "sft.lr=0.2")["base"]
        assert stage["action"] == "run"
        assert stage["reasons"][0].startswith("damaged: ")
    toy.align("run", "sft", "sft.lr=0.2")
    assert weights.read_text() == good


def test_a_stage_that_is_only_needed_by_finished_ones_is_not_made_again(toy: Toy) -> None:
    toy.align("run", "sft")
    (toy.directory("base") / "record.json").unlink()
    assert toy.actions("sft") == {"sft": "reuse"}
    assert toy.actions("sft", "sft.lr=0.2") == {"base": "run", "sft": "stale"}


def test_the_summary_keeps_stages_of_earlier_commands_that_still_agree(toy: Toy) -> None:
    toy.recipe(RECIPE + "other: {kind: sft, policy: sft}\n")
    toy.align("run", "ppo")
    toy.align("run", "other")
    stages = json.loads((toy.run_dir / "summary.json").read_text())["stages"]
    assert list(stages) == [*EVERYTHING, "other"]
    toy.align("run", "other", "sft.lr=0.7")
    stages = json.loads((toy.run_dir / "summary.json").read_text())["stages"]
    assert list(stages) == ["base", "sft", "other"]


def test_dry_run_and_plan_touch_nothing(toy: Toy) -> None:
    before = sorted(toy.folder.rglob("*"))
    shown = toy.align("run", "sft", "--dry-run", "launch.processes=2")
    toy.align("plan", "sft")
    assert sorted(toy.folder.rglob("*")) == before
    commands = [line for line in shown.splitlines() if "align.worker" in line]
    assert len(commands) == 2
    assert f"-m align.launcher --config_file {toy.run_dir}/launch/base.yaml -m align.worker" in commands[0]


def test_wrong_data_of_all_stages_is_told_before_anything_starts(toy: Toy) -> None:
    toy.recipe("name: toy\ndata: rows.jsonl\nbase: {}\nsft: {data: a.jsonl}\nreward: {data: b.jsonl}\n")
    rows = (toy.folder / "rows.jsonl").read_text()
    (toy.folder / "a.jsonl").write_text(rows + '{"prompt": "half')
    (toy.folder / "b.jsonl").write_text(rows + '{"prompt": "x", "chosen": 3, "rejected": "y"}\n')
    shown = toy.align("run", code=3)
    assert "a.jsonl:9" in shown
    assert "b.jsonl:9" in shown
    assert not list(toy.run_dir.glob("*/"))


def test_missing_data_files_are_told_all_at_once(toy: Toy) -> None:
    shown = toy.align("plan", "sft.data=no.jsonl", "reward.data=none.jsonl", code=3)
    assert "no.jsonl" in shown
    assert "none.jsonl" in shown


def test_a_model_from_another_run_is_known_by_its_record(toy: Toy) -> None:
    toy.align("run", "base")
    base = toy.directory("base")
    record = json.loads((base / "record.json").read_text())
    for path in (base, base / "model"):
        stage = toy.plan("sft", f"sft.policy={path}", "--run", "second")["sft"]
        assert stage["inputs"]["policy"]["fingerprint"] == record["fingerprint"]
        assert stage["inputs"]["policy"]["path"] == str(base / "model")
    weights = base / "model" / "model.safetensors"
    weights.write_text("0" * weights.stat().st_size)
    assert "content differs" in toy.align("run", "sft", f"sft.policy={base}", "--run", "second", code=4)


def test_a_run_name_must_be_a_folder_name(toy: Toy) -> None:
    assert "not a folder name" in toy.align("run", "sft", "--run", "../x", code=2)
    assert not Path(toy.folder / "x").exists()


def test_an_ensemble_runs_as_one_chain_and_a_changed_member_re_runs_its_user(toy: Toy) -> None:
    """Real processes: the members run before their user, which finds each under a name of its own."""
    toy.recipe(RECIPE.replace("reward: {}", "a: {kind: reward}\nb: {kind: reward}"))
    toy.align("run", "ppo", "ppo.reward=[a, b]")
    record = json.loads((toy.directory("ppo") / "record.json").read_text())
    assert [value["source"] for value in record["inputs"].values()] == ["sft", "sft", "a", "b"]
    assert set(toy.actions("ppo", "ppo.reward=[a, b]").values()) == {"reuse"}
    stages = toy.plan("ppo", "ppo.reward=[a, b]", "b.lr=0.2")
    assert {name: stage["action"] for name, stage in stages.items()} == {
        **dict.fromkeys(["base", "sft", "a"], "reuse"),
        **dict.fromkeys(["b", "ppo"], "stale"),
    }
    assert stages["ppo"]["reasons"] == ["input reward.2 (b): changed"]
    assert "reward.2: b" in toy.align("lineage", str(toy.directory("ppo")))


def test_what_an_adapter_was_trained_on_is_known_in_the_same_run_and_in_another(toy: Toy) -> None:
    """job.json of the run itself, and the record of the stage's folder given to another run, say the same."""
    lora = "reward.lora={rank: 2, quantise: nf4}"
    toy.align("run", "ppo", lora)
    sft = json.loads((toy.directory("sft") / "record.json").read_text())["fingerprint"]
    given = f"ppo.reward={toy.directory('reward')}"
    toy.align("run", "ppo", given, "--run", "second")
    (second,) = (toy.folder / "runs" / "second" / "ppo").iterdir()
    for folder in (toy.directory("ppo"), second):
        inputs = json.loads((folder / "job.json").read_text())["job"]["inputs"]
        assert (inputs["reward"]["adapter_of"], inputs["reward"]["quantise"]) == (sft, "nf4")
        assert (inputs["policy"]["adapter_of"], inputs["policy"]["quantise"]) == (None, None)
