"""A Bradley-Terry reward model on TRL's RewardTrainer, then normalised on samples of the policy it started from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from align.context import Context
from align.errors import NumericError
from align.evaluation.reward import pair_metrics
from align.evaluation.stage import held_out_prompts
from align.generation.engine import Sampling
from align.generation.transformers_engine import TransformersEngine
from align.job import StageResult
from align.models.handover import NUM_PROBES
from align.models.load import HIGHEST_FIELD
from align.models.lora import add_lora, trainable_parameters, without_wrapper
from align.models.opened import Opened, commit_reward, open_as_reward, open_policy
from align.models.reward import normalise, score_sequences
from align.models.roles import reward_role
from align.recipe.data_settings import Role
from align.recipe.engine_settings import EvaluationSettings
from align.training.passes import prepare_passes
from align.training.prepared import prepared
from align.training.rows import TokenRow, preference_row
from align.training.sharding import loading
from align.training.trainer import CommittedTrainer, run_training, trainer_arguments
from stages.reward.config import SCORING_BATCH, Config

MIN_STD = 1e-6
"""Spread of the raw scores below which there is only rounding noise."""


class PairTrainer(CommittedTrainer, RewardTrainer):
    """TRL's trainer with our checkpoints and guards."""


def run(config: Config, context: Context) -> StageResult:
    """Trains the head and backbone on pairs, normalises, measures on held-out pairs, commits."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    with loading(config):
        opened = open_as_reward(context.input("policy"), config.data.template, quantise=config.quantise)
    rows = prepared(config.data, Role.PREFERENCES, opened.renderer, preference_row, config, context)
    evaluation = EvaluationSettings.model_validate(context.job.evaluation)
    # Raises if one of them is a prompt that policies will be measured on.
    held_out_prompts(evaluation, (), rows.trained_on)

    model = add_lora(opened.model, config.lora, is_reward=True) if config.lora else opened.model
    prepare_passes(model, config)
    arguments = trainer_arguments(config, context, config.optim, len(rows.train))
    trainer = PairTrainer(
        model=model,
        args=RewardConfig(
            **arguments,
            max_length=None,
            remove_unused_columns=False,  # the prompt's, of which the texts are made as they are read
            center_rewards_coefficient=config.center or None,
            disable_dropout=False,  # the model's own is off since it was loaded; an adapter's is what the recipe says
        ),
        train_dataset=rows.train.table.with_transform(_full_texts),
        processing_class=opened.tokenizer,
    )
    run_training(
        trainer,
        context,
        keep_checkpoints=config.checkpoint.keep,
        shown={"loss": "loss", "accuracy": "accuracy", "margin": "margin"},
    )
    samples = reference_samples(config, context, opened, rows.train)
    reward = without_wrapper(model).eval()
    mean, std = normalise_on(reward, samples, rows.train[: len(samples)], opened.renderer.pad_id)
    probes = [_chosen(row) for row in (rows.held_out or rows.train)[:NUM_PROBES]]
    counts = {"trained_parameters": trainable_parameters(model), **rows.counts}
    after = score_all(reward, samples, opened.renderer.pad_id)
    scale = {"reference_mean": float(after.mean()), "reference_std": float(after.std(unbiased=False))}
    measured = held_out_metrics(reward, rows.held_out, opened.renderer.pad_id) if rows.held_out else {}
    _, handover = commit_reward(context.commit_model(), model, opened, probes)
    return StageResult({**measured, **scale, "raw_mean": mean, "raw_std": std, **counts}, handover)


def normalise_on(
    model: Any, samples: Sequence[list[int]], train: Sequence[TokenRow], pad_id: int
) -> tuple[float, float]:
    """Gives the model mean 0 and standard deviation 1 on `samples`; returns what they were.

    Also notes the highest score of the training pairs' chosen responses: PPO raises an alarm when it goes beyond what
    the model has ever seen. Raises NumericError when all samples have the same score.
    """
    scores = score_all(model, samples, pad_id)
    mean, std = float(scores.mean()), float(scores.std(unbiased=False))
    if not std > MIN_STD:
        raise NumericError(
            f"all {len(samples)} reference samples have the same score, so there is no scale to normalise by; raise "
            "normalise.samples, or look at the rows: the reward model may have learnt nothing"
        )
    normalise(model, mean, std)
    setattr(model.config, HIGHEST_FIELD, float(score_all(model, map(_chosen, train), pad_id).max()))
    return mean, std


def held_out_metrics(model: Any, rows: Sequence[TokenRow], pad_id: int) -> dict[str, Any]:
    """Accuracy and its company on held-out pairs."""
    chosen = score_all(model, map(_chosen, rows), pad_id)
    rejected = score_all(model, (row["prompt_ids"] + row["rejected_ids"] for row in rows), pad_id)
    lengths = [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    return pair_metrics(chosen.tolist(), rejected.tolist(), lengths)


def reference_samples(config: Config, context: Context, opened: Opened, train: Sequence[TokenRow]) -> list[list[int]]:
    """Prompt and response ids sampled from the starting policy on training prompts: the distribution on which the
    score is to have mean 0 and standard deviation 1 (Ziegler et al. 2019)."""
    assert config.data is not None
    policy = open_policy(context.input("policy"), config.data.template, quantise=config.quantise).model
    policy.to(opened.model.device)
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
def score_all(model: Any, sequences: Iterable[list[int]], pad_id: int) -> torch.Tensor:
    """Scores (N,) of many sequences, a batch at a time."""
    role, sequences = reward_role(model), iter(sequences)
    batches = iter(lambda: list(islice(sequences, SCORING_BATCH)), [])
    return torch.cat([score_sequences(role, batch, pad_id) for batch in batches])


def _chosen(row: TokenRow) -> list[int]:
    return row["prompt_ids"] + row["chosen_ids"]


def _full_texts(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Columns of rows as the library's trainer takes them: the prompt is part of both texts."""
    return {
        side: [prompt + answer for prompt, answer in zip(rows["prompt_ids"], rows[side], strict=True)]
        for side in ("chosen_ids", "rejected_ids")
    }
