"""Supervised fine-tuning on TRL's SFTTrainer, which gets token ids and labels and decides nothing about text."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from datasets import Dataset as RowDataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from align.context import Context
from align.data.rows import Prompt
from align.evaluation.likelihood import token_loss
from align.evaluation.stage import evaluate_model, held_out_prompts, sampler
from align.job import StageResult
from align.models.handover import NUM_PROBES
from align.models.load import local_folder
from align.models.lora import add_lora, trainable_parameters
from align.models.opened import commit_policy, open_policy
from align.models.roles import causal_role
from align.recipe.settings import EvaluationSettings, Role
from align.training.rows import demonstration_row, load_rows, token_rows
from align.training.trainer import CommittedTrainer, run_training, trainer_arguments
from stages.sft.config import Config


class DemonstrationTrainer(CommittedTrainer, SFTTrainer):
    """TRL's trainer with our checkpoints and guards."""


def run(config: Config, context: Context) -> StageResult:
    """Loads the policy, trains on the assistant's tokens, measures, commits."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    dataset = load_rows(config.data, Role.DEMONSTRATIONS, context)
    opened = open_policy(context.input("policy"), config.data.template, quantise=config.quantise)
    convert = partial(demonstration_row, opened.renderer)
    train, too_long = token_rows(dataset.train, convert, config, context.job.stage)
    held_out, _ = token_rows(dataset.held_out, convert, config, context.job.stage)
    evaluation = EvaluationSettings.model_validate(context.job.evaluation)
    own = [Prompt(row.messages[:-1], row.source) for row in dataset.held_out]
    training = [Prompt(row.messages[:-1], row.source) for row in dataset.train]
    prompts = held_out_prompts(evaluation, own, training)

    model = add_lora(opened.model, config.lora) if config.lora else opened.model
    trainer = DemonstrationTrainer(
        model=model,
        args=SFTConfig(**trainer_arguments(config, context, config.optim, len(train)), max_length=None),
        train_dataset=RowDataset.from_list(train),
        processing_class=opened.tokenizer,
    )
    run_training(
        trainer,
        context,
        keep_checkpoints=config.checkpoint.keep,
        shown={"loss": "loss", "mean_token_accuracy": "accuracy"},
        sample=sampler(context, evaluation, model, opened.renderer, prompts),
        samples_every=config.samples_every,
    )
    loss = {"held_out_loss": token_loss(causal_role(model), held_out, opened.renderer.pad_id)} if held_out else {}
    probes = [row["input_ids"] for row in (held_out or train)[:NUM_PROBES]]
    trained = trainable_parameters(model)
    folder = Path(local_folder(context.input("policy")))
    metrics = evaluate_model(context, evaluation, model, folder, opened.renderer, prompts)
    _, handover = commit_policy(context.commit_model(), model, opened, probes)
    counts = {"rows": len(train), "rows_too_long": too_long, "rows_skipped": len(dataset.report.skipped)}
    return StageResult({**metrics, **loss, "trained_parameters": trained, **counts}, handover)
