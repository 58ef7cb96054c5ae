"""`align run sft reward ppo dpo` as a user calls it: real processes, real libraries, a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from .conftest import Workplace

STAGES = ["base", "sft", "reward", "ppo", "dpo"]


def test_every_stage_reports_final_metrics_with_intervals(chain: Workplace) -> None:
    """summary.json is {"stages": {name: metrics}}; policies have gold and EOS rate, the reward model its accuracy."""
    summary = json.loads((chain.folder / "runs/tiny/summary.json").read_text(encoding="utf-8"))
    assert list(summary["stages"]) == STAGES
    for stage in ("base", "sft", "ppo", "dpo"):
        metrics = summary["stages"][stage]
        assert 0 <= metrics["gold_ci95"][0] <= metrics["gold"] <= metrics["gold_ci95"][1] <= 1
        assert 0 <= metrics["eos_rate"] <= 1
    assert {"kl", "kl_ci95", "reward", "reward_ci95"} <= summary["stages"]["ppo"].keys()
    assert 0 <= summary["stages"]["reward"]["accuracy"] <= 1
    assert abs(summary["stages"]["reward"]["reference_mean"]) < 0.02
    assert abs(summary["stages"]["reward"]["reference_std"] - 1) < 0.02


def test_the_same_command_again_starts_nothing(chain: Workplace) -> None:
    """All stages are reused, so no process is started and job.json stays as it was."""
    before = {stage: (chain.folder_of(stage) / "job.json").stat().st_mtime_ns for stage in STAGES}
    text = chain.align("run", "sft", "reward", "ppo", "dpo", "track=[tensorboard]")
    assert text.count("reuse") >= len(STAGES)
    assert before == {stage: (chain.folder_of(stage) / "job.json").stat().st_mtime_ns for stage in STAGES}


def test_a_changed_kl_coefficient_reruns_only_ppo_and_the_plan_says_why(chain: Workplace) -> None:
    """Field by field: the coefficient, and nothing else."""
    actions = chain.actions("sft", "reward", "ppo", "ppo.kl.coef=0.2")
    assert actions["ppo"] == ("stale", ["kl.coef: 0.05 -> 0.2"])
    assert {stage: action for stage, (action, _) in actions.items() if stage != "ppo"} == dict.fromkeys(
        ("base", "sft", "reward"), "reuse"
    )


def test_one_edited_line_of_the_preferences_reruns_reward_and_ppo(chain: Workplace) -> None:
    """Content decides: reward reads the file, ppo consumes reward; sft does neither. Put back, all is up to date."""
    original = chain.preferences.read_text(encoding="utf-8")
    first, rest = original.split("\n", 1)
    row = json.loads(first)
    chain.preferences.write_text(json.dumps({**row, "chosen": row["chosen"] + " !"}) + "\n" + rest, encoding="utf-8")
    try:
        actions = chain.actions("sft", "reward", "ppo")
    finally:
        chain.preferences.write_text(original, encoding="utf-8")
    assert actions["sft"][0] == "reuse"
    assert actions["reward"][0] == "stale"
    assert "data" in actions["reward"][1][0]
    assert actions["ppo"][0] == "stale"
    assert "reward" in actions["ppo"][1][0]
    assert {action for action, _ in chain.actions("sft", "reward", "ppo").values()} == {"reuse"}


@pytest.mark.parametrize("stage", STAGES)
def test_saved_models_load_with_plain_from_pretrained_and_give_the_trained_values(chain: Workplace, stage: str) -> None:
    """No line of align's loading code is used. Bound 1e-3 nats per sequence; float32 on one machine differs by 0."""
    folder = chain.folder_of(stage) / "model"
    probes = json.loads((folder / "probes.json").read_text(encoding="utf-8"))
    auto_class = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder).eval()
    for probe, expected in zip(probes["probes"], probes["values"], strict=True):
        ids = torch.tensor([probe])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        if stage == "reward":
            value = float(logits[0, 0]) + model.config.reward_offset
        else:
            value = float(logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum())
        assert value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_template_eos_and_a_pad_of_its_own_travel_with_every_model(chain: Workplace, stage: str) -> None:
    """The tokenizer of every stage is the base's, byte for byte in template and ids."""
    folders = [chain.folder_of(name) / "model" for name in ("base", stage)]
    base, tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    assert tokenizer.chat_template == base.chat_template
    assert tokenizer.get_vocab() == base.get_vocab()
    assert tokenizer.pad_token_id == base.pad_token_id != tokenizer.eos_token_id
    generation = json.loads((folders[1] / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == tokenizer.eos_token_id


def test_no_pickle_is_left_behind(chain: Workplace) -> None:
    """Weights are safetensors, everything else is JSON or text."""
    names = {path.name for path in (chain.folder / "runs").rglob("*") if path.is_file()}
    assert not [name for name in names if Path(name).suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_metrics_samples_and_trackers_are_written(chain: Workplace) -> None:
    """metrics.jsonl per stage, PPO's under the names dashboards know, samples at fixed steps, tensorboard files."""
    read = [json.loads(line) for line in (chain.folder_of("ppo") / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in read] == [1, 2, 3]
    old_names = (
        "eps objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores "
        "policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/clipfrac_avg policy/entropy_avg "
        "val/ratio val/ratio_var val/num_eos_tokens lr episode"
    )
    assert set(old_names.split()) <= read[0].keys()
    assert read[0]["objective/kl"] == 0  # the policy starts at its reference
    samples = [json.loads(line) for line in (chain.folder_of("sft") / "samples.jsonl").read_text().splitlines()]
    assert {3, 6} <= {row["step"] for row in samples if row["at"] == "training"}
    assert {"prompt", "response", "gold"} <= samples[-1].keys()
    for stage in ("sft", "reward", "ppo", "dpo"):
        assert list((chain.folder_of(stage) / "tracking").rglob("events.out.tfevents.*")), stage


def test_lineage_names_the_ancestors_and_verifies_them(chain: Workplace) -> None:
    """From the PPO policy back to the base, every file checked."""
    text = chain.align("lineage", str(chain.folder_of("ppo")))
    for stage in ("ppo", "sft", "reward", "base"):
        assert stage in text
    damaged = chain.folder_of("dpo") / "model" / "config.json"
    original = damaged.read_bytes()
    damaged.write_bytes(original.replace(b"{", b"[", 1))
    try:
        chain.align("lineage", str(chain.folder_of("dpo")), expect=4)
    finally:
        damaged.write_bytes(original)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(chain: Workplace) -> None:
    """The whole chain again in another run folder, from nothing: equal sha256 of every stage's weights."""
    chain.align("run", "sft", "reward", "ppo", "dpo", "--run", "again")
    assert chain.weights("again") == chain.weights("tiny")
    chain.align("run", "base", "seed=1", "--run", "other")
    assert chain.record("base", "other")["files"]["model.safetensors"]["sha256"] != chain.weights("tiny")["base"]


def test_dpo_needs_no_recipe_at_all(chain: Workplace, tmp_path: Path) -> None:
    """`align run dpo --model PATH --data FILE` in an empty folder, with LoRA by an override."""
    empty = Workplace(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    model, data = chain.folder_of("sft") / "model", chain.preferences
    text = empty.align("run", "dpo", "--model", str(model), "--data", str(data), "dpo.max_steps=2", "dpo.lora.rank=4")
    (record,) = tmp_path.glob("runs/*/dpo/*/record.json")
    assert "model:" in text
    assert AutoModelForCausalLM.from_pretrained(record.parent / "model")
    assert (record.parent / "model" / "adapter" / "adapter_config.json").is_file()
