"""`align run --dry-run` and `align plan` on the real stages, and their tables. Nothing is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from align.cli.table import render_summary

ZERO = ("sft", "launch.processes=2", "launch.strategy=zero2")
RECIPE = """
name: mine
data: rows.jsonl
base: {steps: 1}
sft: {data: sft.jsonl}
reward: {}
ppo: {}
"""
ENSEMBLE = """
name: mine
data: rows.jsonl
base: {steps: 1}
sft: {data: sft.jsonl}
rm_a: {kind: reward, lora: {rank: 4}}
rm_b: {kind: reward}
ppo: {reward: [rm_a, rm_b], lora: {rank: 4}}
rloo:
  policy: base
  reward: {short: {function: "lengths:short"}}
"""
NO_TORCH = """
import sys
from align.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "trl", "datasets", "accelerate", "peft"} & sys.modules.keys()
    assert not heavy, heavy
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a recipe and its data."""
    (tmp_path / "align.yaml").write_text(RECIPE)
    pairs = [{"prompt": f"p {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    answers = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return tmp_path


def align(folder: Path, *arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
    """stdout and stderr of a command that must not import torch."""
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_the_short_form_is_the_whole_chain(here: Path) -> None:
    out, _ = align(here, "plan", "sft", "reward", "ppo", "--json")
    plan = json.loads(out)
    assert [stage["stage"] for stage in plan["stages"]] == ["base", "sft", "reward", "ppo"]
    assert plan["run"] == "mine"
    assert {slot: value["source"] for slot, value in plan["stages"][-1]["inputs"].items()} == {
        "policy": "sft",
        "reference": "sft",
        "reward": "reward",
    }
    assert {stage["action"] for stage in plan["stages"]} == {"run"}


def test_an_ensemble_is_made_and_the_plan_says_which_models_will_be_in_memory(here: Path) -> None:
    """rm_a is an adapter on the sft that PPO freezes, so it needs no model of its own; rm_b was trained whole."""
    (here / "align.yaml").write_text(ENSEMBLE)
    out, _ = align(here, "plan", "ppo", "--json")
    stages = {stage["stage"]: stage for stage in json.loads(out)["stages"]}
    assert list(stages) == ["base", "sft", "rm_a", "rm_b", "ppo"]
    inputs = {key: value["source"] for key, value in stages["ppo"]["inputs"].items()}
    assert inputs == {"policy": "sft", "reference": "sft", "reward.1": "rm_a", "reward.2": "rm_b"}
    first, second = stages["ppo"]["models"]
    assert first.startswith("sft: actor (adapter")
    assert all(role in first for role in ("critic (adapter)", "reference", "reward.1 (adapter)"))
    assert second == "rm_b: reward.2 (frozen)"
    assert stages["rm_a"]["models"] == []


def test_a_reward_function_needs_no_reward_model_and_is_looked_for_before_anything_runs(here: Path) -> None:
    (here / "align.yaml").write_text(ENSEMBLE)
    _, err = align(here, "plan", "rloo", code=2)
    assert "error: rloo.reward.short.function: no module 'lengths' (" in err
    (here / "lengths.py").write_text("import torch\ndef shrt(batch): ...\n")
    _, err = align(here, "plan", "rloo", code=2)
    assert "no function 'short' in" in err and "did you mean `shrt`?" in err
    (here / "lengths.py").write_text("import torch\ndef short(batch): ...\n")
    out, _ = align(here, "plan", "rloo", "--json")
    stages = json.loads(out)["stages"]
    assert [stage["stage"] for stage in stages] == ["base", "rloo"]
    assert stages[-1]["inputs"].keys() == {"policy", "reference"}


def test_the_demo_has_every_member_of_the_family(here: Path) -> None:
    for kind in ("ppo", "rloo", "grpo"):
        out, _ = align(here, "plan", kind, "-c", "demo", "--json")
        assert [stage["stage"] for stage in json.loads(out)["stages"]] == ["base", "sft", "reward", kind]


def test_the_models_in_memory_are_listed_below_the_plan_and_fit_a_terminal(here: Path) -> None:
    (here / "align.yaml").write_text(ENSEMBLE)
    (here / "lengths.py").write_text("def short(batch): ...\n")
    out, _ = align(here, "plan", "ppo", "rloo", COLUMNS="80")
    table = out[out.index("models in memory") :]
    rows = [line.split()[:2] for line in table.splitlines()]
    assert rows.count(["ppo", "1"]) == rows.count(["rloo", "1"]) == 1
    assert "rm_b: reward.2 (frozen)" in table
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert "models in memory" not in align(here, "plan", "sft")[0]


def test_no_stage_named_means_every_stage_and_the_recipe_is_told(here: Path) -> None:
    out, _ = align(here, "plan")
    assert "recipe: align.yaml" in out
    assert all(name in out for name in ("base", "sft", "reward", "ppo"))
    _, err = align(here, "plan", "--json")
    assert "recipe: align.yaml" in err
    out, _ = align(here, "plan", "-c", "align.yaml")
    assert "recipe:" not in out


def test_a_dry_run_prints_the_commands_and_writes_nothing(here: Path) -> None:
    before = sorted(here.rglob("*"))
    out, _ = align(here, "run", "sft", "sft.optim.lr=1e-4", "--run", "second", "--runs", "out", "--dry-run")
    commands = [line for line in out.splitlines() if "align.worker" in line]
    assert len(commands) == 2
    assert f"{sys.executable} -m align.worker {here.resolve()}/out/second/base/" in commands[0]
    assert sorted(here.rglob("*")) == before


def test_several_processes_go_through_a_launcher(here: Path) -> None:
    """But for a stage that the recipe gives one process."""
    settings = ["launch.processes=2", "base.launch.processes=1"]
    out, _ = align(here, "run", "sft", "--dry-run", *settings, "--run", "two")
    commands = [line for line in out.splitlines() if "align.worker" in line]
    assert "align.launcher" not in commands[0]
    runs = here.resolve() / "runs" / "two"
    assert f"-m align.launcher --config_file {runs}/launch/sft.yaml -m align.worker {runs}/sft/" in commands[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppo", "ppo.launch.processes=3"], "ppo.rollout.prompts: 512 prompts cannot be divided among 3 processes"),
        (["sft", "sft.launch.processes=3"], "sft.batch_size: batch_size 32 cannot be divided among 3 processes"),
        (["sft", "sft.launch={processes: 8, config: a.yaml}"], "config says how many processes there are"),
        (["sft", "sft.launch.config=a.yaml"], "launch.config: not a readable accelerate config"),
        (["sft", "nodes.count=2"], "nodes.address: required for 2 machines"),
        (["sft", "launch.processes=2", "launch.strategy=zero3-nvme"], "/local_nvme: no such folder to move states to"),
        ([*ZERO, "sft.precision=float16"], "sft.precision: passes in float16 need a loss scale"),
        ([*ZERO, "sft.optim.kind=adamw-8bit"], "sft.optim.kind: adamw-8bit was never run on states that are divided"),
    ],
)
def test_processes_that_cannot_be_are_refused_before_anything_starts(here: Path, arguments, message) -> None:
    _, err = align(here, "plan", *arguments, code=2)
    assert message in err


@pytest.mark.parametrize(
    ("strategy", "settings", "keys"),
    [
        ("zero1", ["critic.kind=shared-head"], []),
        ("zero2-offload", [], []),
        ("zero2", ["ema=0.99", "fp32_lm_head=true", "lora={}", "gradient_checkpointing=true"], []),
        ("zero3", ["ema=0.99", "fp32_lm_head=true", "offload=[reward]"], ["fp32_lm_head", "offload"]),
        ("zero3", ["lora={quantise: nf4}", "gradient_checkpointing=true"], ["lora.quantise", "gradient_checkpointing"]),
        ("zero3", ["ema=0.99", "lora={}", "rollout.round_tokens=8"], ["rollout.round_tokens"]),
        ("fsdp", ["ema=0.99", "fp32_lm_head=true", "offload=[reward]"], ["fp32_lm_head", "offload"]),
        ("fsdp", ["critic.kind=shared-head", "rollout.round_tokens=8"], ["rollout.round_tokens"]),
        ("fsdp", ["ema=0.99", "lora={}", "gradient_checkpointing=true"], []),
    ],
)
def test_what_ppo_cannot_do_with_shares_is_refused_by_key(here: Path, strategy, settings, keys) -> None:
    """All of it at once, and nothing that it can do."""
    launch = ["ppo.launch.processes=2", f"ppo.launch.strategy={strategy}"]
    _, err = align(here, "plan", "ppo", *launch, *(f"ppo.{one}" for one in settings), code=2 if keys else 0)
    refused = [line for line in err.splitlines() if "launch.strategy)" in line]
    assert len(refused) == len(keys) and all(f"ppo.{key}: " in err for key in keys)


def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused_by_key(here: Path) -> None:
    """All of it at once; what is "auto" is no contradiction."""
    content = {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto"},
    }
    (here / "zero.json").write_text(json.dumps(content))
    config = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: zero.json}\n"
    (here / "accelerate.yaml").write_text(config)
    _, err = align(here, "plan", "sft", "sft.launch.config=accelerate.yaml", code=2)
    for key, setting in {"gradient_clipping": "optim.max_grad_norm", "optimizer": "optim", "bf16": "precision"}.items():
        assert f"zero.json: {key}: the recipe says this (remove it and set `{setting}` of the stage)" in err
    assert "micro" not in err and "fp16" not in err


def test_an_fsdp_config_that_cannot_be_is_refused_by_key(here: Path) -> None:
    """All of it at once; what the other strategies take is taken."""
    config = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_state_dict_type: FULL_STATE_DICT, "
    (here / "accelerate.yaml").write_text(config + "fsdp_version: 1, fsdp_activation_checkpointing: true}\n")
    _, err = align(here, "plan", "sft", "sft.launch.config=accelerate.yaml", code=2)
    assert "sft: fsdp_config.fsdp_version: version 2 is needed" in err
    assert "sft: fsdp_config.fsdp_state_dict_type: each process saves its own part" in err
    assert "fsdp_activation_checkpointing: the recipe says this (remove it and set `sft.gradient_checkpointing`)" in err
    config = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2, fsdp_offload_params: true}\n"
    (here / "accelerate.yaml").write_text(config)
    align(here, "plan", "sft", "sft.launch.config=accelerate.yaml")
    _, err = align(here, "plan", "ppo", "ppo.launch.config=accelerate.yaml", code=2)
    assert "ppo.launch: shares cannot be moved to main memory" in err


def test_machines_that_meet_are_told_who_is_host(here: Path) -> None:
    """With c10d the one of rank 0 has the store that all of them meet at; each waits an hour for the others."""
    nodes = ["nodes.count=2", "nodes.address=h", "nodes.rendezvous=c10d", "nodes.rank=1"]
    out, _ = align(here, "run", "sft", "--dry-run", "launch.processes=2", *nodes)
    assert "--rdzv_backend c10d --rdzv_conf is_host=false,join_timeout=3600,read_timeout=3600" in out


def test_dpo_from_a_model_and_a_file_needs_no_recipe(here: Path) -> None:
    (here / "align.yaml").unlink()
    model = here / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (model / "model.safetensors").write_text("weights")
    out, err = align(here, "plan", "dpo", "--model", "model", "--data", "rows.jsonl", "--json")
    (stage,) = json.loads(out)["stages"]
    assert stage["inputs"]["policy"]["path"] == str(model.resolve())
    assert "no recipe" in err


def test_every_mistake_on_the_command_line_is_told_without_a_traceback(here: Path) -> None:
    _, err = align(here, "run", "stf", "sft.optim.ler=1", code=2)
    assert "stf" in err
    assert "ler" in err
    assert "Traceback" not in err
    _, err = align(here, "run", "ppo", "ppo.reward=sft", code=2)
    assert "ppo.reward: wants a reward model; sft gives a policy (did you mean 'reward'?)" in err
    _, err = align(here, "run", "sft", "--force", "ppo", code=2)
    assert "--force ppo: no such stage in this run" in err


def shown(summary: dict) -> str:
    """A summary as text, in a terminal of 80."""
    console = Console(width=80, record=True)
    with console.capture() as capture:
        console.print(render_summary(summary))
    return capture.get()


def test_the_result_table_has_intervals_and_dashes_and_fits_a_terminal() -> None:
    policy = {
        "gold": 0.7812,
        "gold_ci95": [0.7511, 0.8113],
        "kl": 6.1,
        "kl_ci95": [5.9, 6.3],
        "eos_rate": 0.991,
        "eos_rate_ci95": [0.98, 1.0],
        "response_length": 12.34,
        "reward": 1.5,
    }
    reward = {"accuracy": 0.8333, "accuracy_ci95": [0.8, 0.9]}
    text = shown({"stages": {"base": {"gold": 0.1}, "ppo": policy, "reward": reward}})
    assert "0.781 ±0.030" in text
    assert "6.10 ±0.20" in text
    assert "0.833 [0.800, 0.900]" in text
    assert "0.99 " in text
    (base,) = [line for line in text.splitlines() if line.strip().startswith("base")]
    assert base.split() == ["base", "0.100", "–", "–", "–", "–"]
    assert "…" not in text


def test_a_stage_without_known_metrics_and_one_with_markup_in_its_name_are_shown() -> None:
    text = shown({"stages": {"[red]x": {"parameters": 3}, "r": {"accuracy": "NaN"}}})
    assert "[red]x" in text
    assert "NaN" in text


def test_plan_memory_estimates_from_settings_alone(here):
    """The base of the recipe: embedding 1024 x 128, and 4 blocks of 16 * 128^2 weights and two norms, and one norm. Its
    tokenizer is not made yet, so tokens are unknown. Nothing is written but what was counted."""
    (here / "runs").mkdir()
    out, _ = align(here, "plan", "ppo", "--memory", "--json")
    found = json.loads(out)["memory"]
    number = 1024 * 128 + 4 * (16 * 128**2 + 256) + 128
    assert found["base"]["parameters"] == number
    assert found["sft"]["parameters"] == found["sft"]["trained_parameters"] == number
    assert (found["sft"]["steps"], found["sft"]["tokens"], found["sft"]["strategy"]) == (1, None, "one")
    assert found["sft"]["artifact"] == 4 * number and found["sft"]["checkpoint"] == 12 * number
    assert found["sft"]["peak"] == sum(found["sft"]["parts"].values())
    assert set(found["ppo"]["models"]) == {"actor", "reference", "critic", "reward"}
    assert {path.name for path in (here / "runs").iterdir()} == {".cache", ".hashes.json", ".shapes.json"}


def test_plan_gpu_says_what_fits(here):
    """Half a GiB holds nothing, because CUDA takes more; 80 hold everything. NF4 is not divided."""
    (here / "runs").mkdir()
    small, _ = align(here, "plan", "sft", "--gpu", "8x512MiB")
    assert "sft on 8 x 0.50 GiB" in small and "peak of a GPU, GiB" in small and "base on 8 x 0.50 GiB" in small
    assert " no" in small and " fits" not in small
    out, _ = align(here, "plan", "sft", "--gpu", "8x80GiB", "--json")
    large = json.loads(out)["memory"]["sft"]["strategies"]
    assert list(large) == [
        "one",
        "ddp",
        "zero1",
        "zero2",
        "zero3",
        "zero2-offload",
        "zero3-offload",
        "zero3-nvme",
        "fsdp",
    ]
    for row in large.values():
        assert list(row) == ["full", "lora", "qlora"]
        assert all(cell["fits"] for cell in row.values() if cell)
    assert large["zero3"]["qlora"] is None and large["zero2"]["qlora"]
    assert large["zero2-offload"]["full"]["host"] > 0 == large["zero2"]["full"]["host"]


def test_plan_without_either_asks_nobody(here):
    (here / "runs").mkdir()
    out, _ = align(here, "plan", "sft", "--json")
    assert "memory" not in json.loads(out)
    assert not (here / "runs" / ".shapes.json").exists()


def test_a_wrong_gpu_is_a_usage_error(here):
    _, err = align(here, "plan", "sft", "--gpu", "eight", code=2)
    assert "--gpu eight: not a number of GPUs and their memory (write 8x24GiB, or 80GB for one)" in err


def test_a_model_that_is_not_here_is_unknown(here):
    """A hub id that was never downloaded: nothing is fetched."""
    revision = "a" * 40
    arguments = ["plan", "sft", "--model", f"org/none@{revision}", "--memory", "--json"]
    out, _ = align(here, *arguments, HF_HUB_CACHE=str(here / "cache"))
    assert json.loads(out)["memory"]["sft"] == {"unknown": "config.json of org/none is not on this machine"}
