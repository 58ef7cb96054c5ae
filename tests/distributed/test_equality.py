"""base, sft, reward, dpo and kto on two processes give what one gives: losses, weights, and what is measured then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.metrics import JsonLines
from align.records import read_manifest
from tests.distributed.conftest import CASES, NF4, ON_DISK, PRECOMPUTED, QUANTISED, SAMPLED, STOPPED, World, case_name
from tests.stages.harness import STEPS, Run, weights_hash

LOSS = 2e-6
"""Bound of differences between losses. Measured: 1e-6, from sums in another order."""
WEIGHTS = 1e-5
"""And between final weights, which the training moves by up to 0.03. Measured: 3e-6."""


def gap(one: Run, two: Run) -> float:
    found, right = (load_file(run.model / "model.safetensors") for run in (two, one))
    assert found.keys() == right.keys() and all(tensor.numel() for tensor in found.values())
    return max(float((found[name] - right[name]).abs().max()) for name in right)


@pytest.mark.parametrize(("kind", "strategy", "lora"), CASES)
def test_two_processes_train_what_one_trains(kind, strategy, lora, world: World):
    """On the same batches: 19 rows in batches of 4, so the fifth is divided into two and one. Warm-up, decay, clipping
    and shuffling are on."""
    one, two = world.one(kind, lora), world.two(case_name(kind, strategy, lora))
    ours, theirs = two.metrics(), one.metrics()
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for name in {"loss", "learning_rate", "num_tokens"} & theirs[0].keys():
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs], abs=LOSS), name
    assert [row["grad_norm"] for row in ours] == pytest.approx([row["grad_norm"] for row in theirs], rel=1e-5)
    assert gap(one, two) < WEIGHTS


@pytest.mark.parametrize(("kind", "strategy", "lora"), CASES)
def test_what_two_processes_make_is_handed_over_and_measured(kind, strategy, lora, world: World):
    """There are two; the hand-over check passes on what is loaded afresh by the plain library; the metrics are those of
    one process, the same in both; and each file was written once."""
    name = case_name(kind, strategy, lora)
    two, told = world.two(name), [world.told(name, process) for process in range(2)]
    assert [one["processes"] for one in told] == [2, 2]
    assert told[0]["metrics"] == told[1]["metrics"] and told[0]["handover"] == told[1]["handover"]
    assert told[0]["handover"]["largest_difference"] <= told[0]["handover"]["bound"]
    read_manifest(two.model, hashes=True)
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    assert all(weight.numel() for weight in auto.from_pretrained(two.model).state_dict().values())
    assert (two.model / "adapter").is_dir() is lora
    ours, theirs = (JsonLines(run.directory / "samples.jsonl").read() for run in (two, world.one(kind, lora)))
    assert [row["response"] for row in ours] == [row["response"] for row in theirs]
    assert [row.get("kl", 0) for row in ours] == pytest.approx([row.get("kl", 0) for row in theirs], abs=1e-4)
    assert not list(two.directory.rglob(".tmp-*"))


@pytest.mark.parametrize(("kind", "strategy", "lora"), STOPPED)
def test_a_signal_in_one_process_stops_all_and_they_resume_exactly(kind, strategy, lora, world: World):
    """The last process gets SIGTERM after step 3: both stop with the checkpoint of step 4, and the same processes go on
    to what they would have made undisturbed, to the last bit."""
    name = f"{kind}-{strategy}-stopped"
    stopped = [json.loads((world.folder / name / f"stopped-{process}.json").read_text()) for process in range(2)]
    assert all("stopped at step 4 with a checkpoint" in one["error"] for one in stopped)
    straight, resumed = world.two(case_name(kind, strategy, lora)), world.two(name)
    assert resumed.metrics() == straight.metrics()
    assert weights_hash(resumed.model) == weights_hash(straight.model)


@pytest.mark.parametrize(("kind", "strategy", "lora"), ON_DISK[:1])
def test_a_stage_with_states_on_a_disk_is_not_resumed(kind, strategy, lora, world: World):
    """DeepSpeed would go on from other states, and say nothing."""
    for process in range(2):
        told = json.loads((world.folder / f"{kind}-{strategy}-stopped" / f"resumed-{process}.json").read_text())
        assert "does not restore an optimiser whose state is on a disk" in told["error"]


def test_a_mean_over_pairs_is_no_mean_of_means(world: World):
    """Two processes with two passes each, of one pair: of the three pairs of the fifth step one process has two and the
    other one, and each counts the same."""
    one, two = world.one("reward"), world.two("reward-ddp-micro")
    assert [row["loss"] for row in two.metrics()] == pytest.approx([row["loss"] for row in one.metrics()], abs=LOSS)
    assert gap(one, two) < WEIGHTS


@pytest.mark.parametrize("strategy", PRECOMPUTED)
def test_a_reference_computed_before_the_training_is_the_same(strategy, world: World):
    """By both processes, of their own rows; under ZeRO-3 from weights of which each holds a part."""
    one, two = world.one("dpo"), world.two(f"dpo-{strategy}-precomputed")
    assert [row["loss"] for row in two.metrics()] == pytest.approx([row["loss"] for row in one.metrics()], abs=LOSS)
    assert gap(one, two) < WEIGHTS


@pytest.mark.parametrize("strategy", QUANTISED)
def test_adapters_on_a_base_in_4_bits(strategy, world: World, tmp_path: Path):
    """As in one process: its base is whole in each."""
    one, two = Run("sft", tmp_path, world.policy, world.settings("sft", **NF4)), world.two(f"sft-{strategy}-nf4")
    one()
    assert [row["loss"] for row in two.metrics()] == pytest.approx([row["loss"] for row in one.metrics()], abs=LOSS)
    assert gap(one, two) < WEIGHTS


def test_under_zero3_no_process_has_loaded_a_whole_weight(world: World):
    """Made whole again, every weight is what one process loads: also the new head, drawn by the first process."""
    for process in range(2):
        told = world.told("loaded", process)
        assert "score.weight" in told["held"] and set(told["held"].values()) == {0}
        assert told["differing"] == []


def test_under_zero3_embeddings_grow_as_in_one_process(world: World):
    """They are whole until the training starts. Growing draws random numbers, so another head is drawn."""
    for process in range(2):
        told = world.told("loaded-foreign", process)
        assert [name for name, numbers in told["held"].items() if numbers] == ["model.embed_tokens.weight"]
        assert told["differing"] == ["score.weight"]


def test_under_zero3_a_missing_weight_is_named(world: World):
    for process in range(2):
        assert "does not hold all weights" in world.told("loaded-damaged", process)["error"]


@pytest.mark.parametrize("strategy", SAMPLED)
def test_samples_are_taken_while_weights_are_sharded(strategy, world: World):
    """In the middle of a training, which goes on as it would have without them."""
    plain, sampled = world.two(case_name("sft", strategy, False)), world.two(f"sft-{strategy}-sampled")
    rows = JsonLines(sampled.directory / "samples.jsonl").read()
    assert [row["step"] for row in rows if row["at"] == "training"] == [2] * 4 + [4] * 4 + [6] * 4
    assert weights_hash(sampled.model) == weights_hash(plain.model)


def test_training_moves_weights_by_more_than_the_bound(world: World):
    """What makes the bounds above mean something."""
    before = load_file(f"{world.policy.path}/model.safetensors")
    after = load_file(world.one("sft").model / "model.safetensors")
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1000 * WEIGHTS
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
