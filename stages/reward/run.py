"""A Bradley-Terry reward model on TRL's RewardTrainer, then normalised on samples of the policy it started from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset as RowDataset
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from align.context import Context
from align.errors import NumericError
from align.evaluation.reward import pair_metrics
from align.generation.engine import Sampling
from align.generation.transformers_engine import TransformersEngine
from align.job import StageResult
from align.models.handover import NUM_PROBES
from align.models.lora import add_lora, trainable_parameters, without_wrapper
from align.models.opened import Opened, commit_reward, open_as_reward, open_policy
from align.models.reward import normalise, score_sequences
from align.recipe.settings import Role
from align.training.rows import TokenRow, load_rows, preference_row, token_rows
from align.training.trainer import CommittedTrainer, run_training, trainer_arguments
from stages.reward.config import Config

SCORING_BATCH = 64
MIN_STD = 1e-6
"""Spread of the raw scores below which there is only rounding noise."""


class PairTrainer(CommittedTrainer, RewardTrainer):
    """TRL's trainer with our checkpoints and guards."""


def run(config: Config, context: Context) -> StageResult:
    """Trains the head and backbone on pairs, normalises, commits, measures on held-out pairs."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    dataset = load_rows(config.data, Role.PREFERENCES, context)
    opened = open_as_reward(context.input("policy"), config.data.template)

    def convert(row):  # one conversion for both splits
        return preference_row(opened.renderer, row)

    train, too_long = token_rows(dataset.train, convert, config, context.job.stage)
    held_out, _ = token_rows(dataset.held_out, convert, config, context.job.stage)

    model = add_lora(opened.model, config.lora, is_reward=True) if config.lora else opened.model
    arguments = trainer_arguments(config, context, config.optim, len(train))
    trainer = PairTrainer(
        model=model,
        args=RewardConfig(**arguments, max_length=None, center_rewards_coefficient=config.center or None),
        train_dataset=RowDataset.from_list([_full_texts(row) for row in train]),
        processing_class=opened.tokenizer,
    )
    run_training(
        trainer,
        context,
        keep_checkpoints=config.checkpoint.keep,
        shown={"loss": "loss", "accuracy": "accuracy", "margin": "margin"},
    )
    trained = trainable_parameters(model)
    with_adapter = without_wrapper(model).eval()
    samples = reference_samples(config, context, opened, train)
    before = score_all(with_adapter, samples, opened.renderer.pad_id)
    mean, std = float(before.mean()), float(before.std(unbiased=False))
    if not std > MIN_STD:
        raise NumericError(
            f"{context.job.stage}: all {len(samples)} reference samples have the same score, so there is no scale to "
            "normalise by; raise normalise.samples, or look at the rows: the model may have learnt nothing"
        )
    normalise(with_adapter, mean, std)
    probes = [row["prompt_ids"] + row["chosen_ids"] for row in (held_out or train)[:NUM_PROBES]]
    reward, handover = commit_reward(context.commit_model(), model, opened, probes)

    after = score_all(reward, samples, opened.renderer.pad_id)
    metrics: dict[str, Any] = {
        "reference_mean": float(after.mean()),
        "reference_std": float(after.std(unbiased=False)),
        "raw_mean": mean,
        "raw_std": std,
        "trained_parameters": trained,
        "rows": len(train),
        "rows_too_long": too_long,
        "rows_skipped": len(dataset.report.skipped),
    }
    if held_out:
        pad_id = opened.renderer.pad_id
        chosen = score_all(reward, [row["prompt_ids"] + row["chosen_ids"] for row in held_out], pad_id)
        rejected = score_all(reward, [row["prompt_ids"] + row["rejected_ids"] for row in held_out], pad_id)
        lengths = [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in held_out]
        metrics = {**pair_metrics(chosen.tolist(), rejected.tolist(), lengths), **metrics}
    return StageResult(metrics, handover)


def reference_samples(config: Config, context: Context, opened: Opened, train: Sequence[TokenRow]) -> list[list[int]]:
    """Prompt and response ids sampled from the starting policy on training prompts: the distribution on which the
    score is to have mean 0 and standard deviation 1 (Ziegler et al. 2019)."""
    assert config.data is not None
    policy = open_policy(context.input("policy"), config.data.template).model.to(opened.model.device)
    count = config.normalise.samples
    prompts = [train[index % len(train)]["prompt_ids"] for index in range(count)]
    renderer = opened.renderer
    sampling = Sampling(
        config.normalise.max_response_tokens,
        1.0,
        renderer.stop_ids,
        renderer.pad_id,
        context.seed("normalise"),
    )
    samples = TransformersEngine(policy, SCORING_BATCH).generate(prompts, sampling)
    # A response that was cut off is closed, so that every score is read where the model was trained to give it.
    return [
        prompt + response + ([] if finished else [renderer.end_of_turn])
        for prompt, response, finished in zip(prompts, samples.rows(), samples.finished.tolist(), strict=True)
    ]


@torch.no_grad()
def score_all(model: Any, sequences: Sequence[list[int]], pad_id: int) -> torch.Tensor:
    """Scores (N,) of many sequences, a batch at a time."""
    batches = [sequences[start : start + SCORING_BATCH] for start in range(0, len(sequences), SCORING_BATCH)]
    return torch.cat([score_sequences(model, batch, pad_id) for batch in batches])


def _full_texts(row: TokenRow) -> TokenRow:
    return {
        "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
        "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
    }
