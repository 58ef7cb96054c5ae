"""Supervised fine-tuning on TRL's SFTTrainer, which gets token ids and labels and decides nothing about text."""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from align.context import Context
from align.evaluation.likelihood import token_loss
from align.evaluation.stage import evaluate_model, held_out_prompts, sampler
from align.job import StageResult
from align.models.handover import NUM_PROBES
from align.models.load import local_folder
from align.models.lora import add_lora, trainable_parameters
from align.models.opened import commit_policy, open_policy
from align.models.roles import causal_role
from align.recipe.data_settings import Role
from align.recipe.engine_settings import EvaluationSettings
from align.training.passes import prepare_passes
from align.training.prepared import prepared
from align.training.rows import demonstration_row
from align.training.sharding import loading
from align.training.trainer import CommittedTrainer, run_training, trainer_arguments
from stages.sft.config import Config


class DemonstrationTrainer(CommittedTrainer, SFTTrainer):
    """TRL's trainer with our checkpoints and guards."""


def run(config: Config, context: Context) -> StageResult:
    """Loads the policy, trains on the assistant's tokens, measures, commits."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    with loading(config):
        opened = open_policy(context.input("policy"), config.data.template, quantise=config.quantise)
    rows = prepared(config.data, Role.DEMONSTRATIONS, opened.renderer, demonstration_row, config, context)
    evaluation = EvaluationSettings.model_validate(context.job.evaluation)
    prompts = held_out_prompts(evaluation, rows.prompts, rows.trained_on)

    model = add_lora(opened.model, config.lora) if config.lora else opened.model
    prepare_passes(model, config)
    trainer = DemonstrationTrainer(
        model=model,
        args=SFTConfig(**trainer_arguments(config, context, config.optim, len(rows.train)), max_length=None),
        train_dataset=rows.train.table,
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
    pad = opened.renderer.pad_id
    loss = {"held_out_loss": token_loss(causal_role(model), rows.held_out, pad)} if rows.held_out else {}
    probes = [row["input_ids"] for row in (rows.held_out or rows.train)[:NUM_PROBES]]
    trained = trainable_parameters(model)
    folder = Path(local_folder(context.input("policy")))
    metrics = evaluate_model(context, evaluation, model, folder, opened.renderer, prompts)
    _, handover = commit_policy(context.commit_model(), model, opened, probes)
    return StageResult({**metrics, **loss, "trained_parameters": trained, **rows.counts}, handover)
