"""The glue between our settings and TRL's trainers: what is trained on, what is passed through, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset as RowDataset
from trl import SFTConfig

from align.data.rows import Demonstration
from align.errors import DataError, NumericError
from align.evaluation.likelihood import token_loss
from align.models.opened import open_policy
from align.models.roles import causal_role
from align.training.rows import demonstration_row
from align.training.trainer import run_training, trainer_arguments
from stages.sft.run import DemonstrationTrainer
from tests.stages.harness import weights_hash


def all_rows(run, renderer) -> list[dict[str, list[int]]]:
    """Every demonstration of the run's file as ids and labels."""
    rows = [json.loads(line) for line in Path(run.settings["data"]["path"]).read_text().splitlines()]
    return [
        demonstration_row(
            renderer,
            Demonstration(
                [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["response"]},
                ],
                "rows.jsonl:1",
            ),
        )
        for row in rows
    ]


@pytest.mark.parametrize("micro_batch_size", [24, 8, 3])
def test_sft_loss_is_the_mean_over_assistant_tokens_only(new_run, base, tmp_path, micro_batch_size):
    """The first loss over all rows is the negative log-likelihood of the labelled tokens divided once by their
    number, however the step is cut into micro-batches: prompts do not count, and short rows count by their tokens."""
    run = new_run("sft", tmp_path, batch_size=24, micro_batch_size=micro_batch_size, max_steps=1)
    run = run.at(tmp_path, settings={**run.settings, "data": {**run.settings["data"], "held_out": 0.0}})
    run()
    opened = open_policy(base, "auto")
    rows = all_rows(run, opened.renderer)
    role, pad_id = causal_role(opened.model), opened.renderer.pad_id
    expected = token_loss(role, rows, pad_id)
    everything = token_loss(role, [{**row, "labels": row["input_ids"]} for row in rows], pad_id)
    assert run.metrics()[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected - everything) > 0.01  # the number would show it if prompts were trained on


def test_labels_are_the_answer_and_the_end_of_turn(base):
    """One row worked out: labels are -100 on the prompt, then the answer's ids, the last of them the end of turn."""
    renderer = open_policy(base, "auto").renderer
    messages = [{"role": "user", "content": "say hat"}, {"role": "assistant", "content": "hat ."}]
    row = demonstration_row(renderer, Demonstration(messages, "rows.jsonl:1"))
    prompt, response = renderer.prompt(messages[:1]), renderer.response(messages[:1], "hat .")
    assert row["input_ids"] == prompt + response
    assert row["labels"] == [-100] * len(prompt) + response
    assert row["labels"][-1] == renderer.end_of_turn


def make_trainer(run) -> tuple:
    """The real SFT trainer on the run's rows, as the stage makes it."""
    context, config = run.context(), run.config()
    opened = open_policy(run.policy, "auto")
    rows = all_rows(run, opened.renderer)
    trainer = DemonstrationTrainer(
        model=opened.model,
        args=SFTConfig(**trainer_arguments(config, context, config.optim, len(rows)), max_length=None),
        train_dataset=RowDataset.from_list(rows),
        processing_class=opened.tokenizer,
    )
    return trainer, opened.model, context


@pytest.mark.parametrize("broken", ["loss", "gradient norm"])
def test_a_non_finite_number_stops_before_it_reaches_the_weights(new_run, tmp_path, broken):
    """A NaN in the logits, or an infinite gradient under a finite loss, at step 3: the run stops with exit code 70
    and the weights are those after step 2. (The library logs such a loss as 0 and trains on.)"""
    trainer, model, context = make_trainer(new_run("sft", tmp_path, log_every=10))
    after_step: dict[int, torch.Tensor] = {}

    def at_step_3(value: torch.Tensor, bad: float) -> torch.Tensor:
        after_step.setdefault(trainer.state.global_step, model.model.norm.weight.detach().clone())
        return value * bad if trainer.state.global_step == 2 else value

    if broken == "loss":
        model.model.norm.register_forward_hook(lambda _module, _inputs, output: at_step_3(output, float("nan")))
    else:
        model.model.norm.weight.register_hook(lambda gradient: at_step_3(gradient, float("inf")))
    with pytest.raises(NumericError, match=rf"sft: the {broken} is (nan|inf) at step 3; nothing was saved") as caught:
        run_training(trainer, context, keep_checkpoints=2, shown={})
    assert caught.value.exit_code == 70
    assert torch.equal(model.model.norm.weight, after_step[2])
    assert not torch.equal(after_step[1], after_step[2])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_trainer_args_reach_trl(finished, new_run, tmp_path):
    """A setting of TRL's that align does not model: embedding noise changes the very first loss."""
    straight, _ = finished("sft")
    noisy = new_run("sft", tmp_path, trainer_args={"neftune_noise_alpha": 20.0})
    noisy()
    assert noisy.metrics()[0]["loss"] != straight.metrics()[0]["loss"]
    assert weights_hash(noisy.model) != weights_hash(straight.model)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 3}, 3),
        ({"max_steps": None, "epochs": 1}, 6),  # 24 rows, 4 to a step
        ({"max_steps": None, "epochs": 1, "batch_size": 10}, 3),  # 2.4 steps: none of the rows is left out
        ({"max_steps": None, "epochs": 0.5}, 3),
    ],
)
def test_number_of_steps(new_run, tmp_path, settings, steps):
    """max_steps wins over epochs, and a broken step counts."""
    run = new_run("sft", tmp_path, **settings)
    run = run.at(tmp_path, settings={**run.settings, "data": {**run.settings["data"], "held_out": 0.0}})
    run()
    assert run.metrics()[-1]["step"] == steps


def test_a_batch_is_cut_into_micro_batches(new_run, tmp_path):
    """batch_size is rows per optimiser step whatever fits in memory: one row at a time gives the same first loss and
    nearly the same weights' norm of the gradient."""
    whole, single = new_run("sft", tmp_path / "a"), new_run("sft", tmp_path / "b", micro_batch_size=1)
    whole()
    single()
    for name in ("loss", "grad_norm"):
        assert single.metrics()[0][name] == pytest.approx(whole.metrics()[0][name], rel=1e-3)


def test_long_rows_are_counted_or_refused(new_run, tmp_path):
    """on_long drop: left out and counted in the final metrics. on_long error: the rows are named."""
    dropped = new_run("sft", tmp_path / "drop", max_length=36)
    metrics = dropped().metrics
    assert metrics["rows_too_long"] > 0
    assert metrics["rows"] > 0
    with pytest.raises(DataError, match=r"demonstrations\.jsonl:\d+: \d+ tokens, max_length is 36"):
        new_run("sft", tmp_path / "error", max_length=36, on_long="error")()


def test_rows_left_out_are_written_down(new_run, tmp_path):
    """on_bad skip: the malformed row is in rejected.jsonl with file and line, and in the metrics."""
    run = new_run("sft", tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(run.settings["data"]["path"]).read_text() + '{"prompt": "say hat", "response": 7}\n')
    run = run.at(tmp_path / "run", settings={**run.settings, "data": {"path": str(bad), "on_bad": "skip"}})
    assert run().metrics["rows_skipped"] == 1
    (line,) = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["where"].endswith("bad.jsonl:25")


def test_a_reward_without_spread_is_refused(new_run, tmp_path):
    """One reference sample has no standard deviation to divide by: an error, not a model full of NaN."""
    run = new_run("reward", tmp_path, normalise={"samples": 1, "max_response_tokens": 4}, max_steps=1)
    with pytest.raises(NumericError, match="all 1 reference samples have the same score"):
        run()
    assert not run.model.exists()


def test_metrics_that_stages_promise(finished):
    """Names that reports and the README's table read."""
    _, sft = finished("sft")
    assert {"held_out_loss", "eos_rate", "eos_rate_ci95", "response_length", "rows", "trained_parameters"} <= set(
        sft.metrics
    )
    _, dpo = finished("dpo")
    assert {"kl", "kl_ci95", "accuracy", "accuracy_ci95", "pairs"} <= set(dpo.metrics)
    _, reward = finished("reward")
    promised = {"accuracy", "accuracy_ci95", "margin", "log_loss", "length_only_accuracy", "reference_mean"}
    assert promised <= set(reward.metrics)


def test_dropout_of_a_reward_adapter_is_what_the_recipe_says(finished, new_run, tmp_path):
    """TRL would switch it off. With it training takes another course."""
    dropped = new_run("reward", tmp_path, lora={"rank": 4, "alpha": 8, "dropout": 0.5})
    dropped()
    assert [row.get("loss") for row in dropped.metrics()] != [
        row.get("loss") for row in finished("reward", True)[0].metrics()
    ]
