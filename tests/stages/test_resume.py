"""Stopping and going on is never going elsewhere: the same weights, bit for bit, as a run that was left alone."""

from __future__ import annotations

import os
import signal

import pytest

from align.errors import ArtifactError, Interrupted
from align.training.checkpoints import newest_valid
from tests.stages.harness import LORA, STEPS, stop_after, weights_hash

KINDS = ["sft", "dpo", "kto", "reward"]


class Crash(Exception):
    """Stands for a power cut: nothing of ours handles it."""


def crash_at(step: int):
    def at_step(context, now):
        if now == step:
            raise Crash

    return at_step


@pytest.mark.parametrize("kind", KINDS)
def test_stop_and_resume_equals_a_straight_run(kind, finished, new_run, tmp_path):
    """Ctrl-C at a step that is no multiple of the checkpoint interval, then the same command: final weights and every
    line of metrics are bitwise those of the straight run. Warm-up, decay and shuffling are on."""
    straight, _ = finished(kind)
    run = new_run(kind, tmp_path)
    with pytest.raises(Interrupted, match=rf"{kind}: stopped at step 3 with a checkpoint"):
        run(stop_after(2))
    assert not run.model.exists()
    assert newest_valid(tmp_path / "checkpoints")[0] == 3
    run()
    assert weights_hash(run.model) == weights_hash(straight.model)
    assert run.metrics() == straight.metrics()
    assert len({row["learning_rate"] for row in run.metrics()}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_crash_and_resume_equals_a_straight_run(kind, finished, new_run, tmp_path):
    """A crash at step 5: resumes from the checkpoint of step 4, and step 5 is not in metrics.jsonl twice."""
    straight, _ = finished(kind)
    run = new_run(kind, tmp_path)
    with pytest.raises(Crash):
        run(crash_at(5))
    assert run.metrics()[-1]["step"] == 5
    run()
    assert weights_hash(run.model) == weights_hash(straight.model)
    assert [row["step"] for row in run.metrics()] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_resume_with_adapters_equals_a_straight_run(kind, finished, new_run, tmp_path):
    """The same with LoRA, where a checkpoint holds the adapter (and DPO's reference is a second, frozen one)."""
    straight, _ = finished(kind, lora=True)
    run = new_run(kind, tmp_path, **LORA)
    with pytest.raises(Crash):
        run(crash_at(3))
    run()
    assert weights_hash(run.model) == weights_hash(straight.model)
    assert run.metrics() == straight.metrics()


def test_resume_with_dropout_restores_the_random_state(new_run, tmp_path):
    """Adapter dropout draws numbers at every step: they continue where they were."""
    lora = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.3}}
    straight, resumed = new_run("sft", tmp_path / "straight", **lora), new_run("sft", tmp_path / "resumed", **lora)
    straight()
    with pytest.raises(Interrupted):
        resumed(stop_after(2))
    resumed()
    assert weights_hash(resumed.model) == weights_hash(straight.model)
    assert resumed.metrics() == straight.metrics()


def test_resume_in_the_middle_of_an_accumulated_epoch(new_run, tmp_path):
    """Two micro-batches to a step, two and a half passes over the rows: the data order continues where it was."""
    settings = {"micro_batch_size": 2, "max_steps": 12}
    straight, resumed = new_run("sft", tmp_path / "a", **settings), new_run("sft", tmp_path / "b", **settings)
    straight()
    for step in (2, 6):
        with pytest.raises(Interrupted):
            resumed(stop_after(step))
    resumed()
    assert weights_hash(resumed.model) == weights_hash(straight.model)
    assert resumed.metrics() == straight.metrics()


def test_a_real_signal_stops_with_a_checkpoint(new_run, tmp_path):
    """SIGTERM, as a scheduler sends it: the step is finished, saved, and the error says how to continue."""
    run = new_run("sft", tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def terminate(context, step):
        if step == 1:
            context.stop.install()
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.raises(Interrupted, match="run the same command to continue") as caught:
            run(terminate)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert caught.value.exit_code == 75
    assert newest_valid(tmp_path / "checkpoints")[0] == 2


def test_a_stop_at_the_last_step_still_finishes(finished, new_run, tmp_path):
    """Nothing is left to resume: the artifact is committed."""
    straight, _ = finished("sft")
    run = new_run("sft", tmp_path)
    run(stop_after(STEPS - 1))
    assert weights_hash(run.model) == weights_hash(straight.model)


def test_checkpoints_are_committed_and_hold_no_pickle_of_arguments(new_run, tmp_path):
    """Every checkpoint has a manifest that verifies byte for byte; training_args.bin, which can hold tokens, is not
    there; only the newest two are kept; sampling in between leaves no trace in the weights."""
    run = new_run("sft", tmp_path)
    with pytest.raises(Crash):
        run(crash_at(6))
    folders = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-2", "step-4"]
    step, folder = newest_valid(tmp_path / "checkpoints")
    names = {path.name for path in folder.iterdir()}
    assert step == 4
    assert {"MANIFEST.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names
    assert "training_args.bin" not in names


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(finished, new_run, tmp_path):
    """One bit of the newest optimiser state flipped: the run goes on from the previous checkpoint and still ends
    with the same weights."""
    straight, _ = finished("sft")
    run = new_run("sft", tmp_path)
    with pytest.raises(Crash):
        run(crash_at(5))
    damage(tmp_path / "checkpoints" / "step-4" / "optimizer.pt")
    assert newest_valid(tmp_path / "checkpoints")[0] == 2
    run()
    assert weights_hash(run.model) == weights_hash(straight.model)
    assert run.metrics() == straight.metrics()


def test_all_checkpoints_damaged_is_an_error(new_run, tmp_path):
    """Starting again from step 0 would throw work away silently: the user is asked to."""
    run = new_run("sft", tmp_path)
    with pytest.raises(Crash):
        run(crash_at(5))
    for folder in (tmp_path / "checkpoints").iterdir():
        damage(folder / "model.safetensors")
    with pytest.raises(ArtifactError, match="no checkpoint verifies; remove the folder to start the stage again"):
        run()


def test_sampling_during_training_does_not_change_it(finished, new_run, tmp_path):
    """samples_every is left out of the fingerprint, so it must not touch the weights."""
    straight, _ = finished("sft")
    run = new_run("sft", tmp_path, samples_every=2)
    run()
    assert weights_hash(run.model) == weights_hash(straight.model)
    at = [(row["step"], row["at"]) for row in run.context().samples.read()]
    assert {(2, "training"), (4, "training"), (6, "training"), (6, "final")} == set(at)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_weights_other_seed_other_weights(kind, finished, new_run, tmp_path):
    """Determinism on one machine; and the seed does something."""
    straight, _ = finished(kind)
    again = new_run(kind, tmp_path / "again")
    again()
    other = again.at(tmp_path / "other", seed=1)
    other()
    assert weights_hash(again.model) == weights_hash(straight.model)
    assert weights_hash(other.model) != weights_hash(straight.model)


def damage(path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
