"""Direct preference optimisation on TRL's DPOTrainer, which gets token ids and decides nothing about text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset as RowDataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from align.context import Context
from align.data.rows import Prompt
from align.evaluation.likelihood import preference_metrics
from align.evaluation.stage import evaluate_model, held_out_prompts, sampler
from align.job import StageResult
from align.models.handover import NUM_PROBES
from align.models.load import local_folder
from align.models.lora import add_lora, trainable_parameters
from align.models.opened import commit_policy, open_policy
from align.models.roles import causal_role
from align.recipe.settings import EvaluationSettings, Role
from align.training.rows import load_rows, preference_row, token_rows
from align.training.trainer import CommittedTrainer, run_training, trainer_arguments
from stages.dpo.config import Config


class PreferenceTrainer(CommittedTrainer, DPOTrainer):
    """TRL's trainer with our checkpoints and guards."""

    def _prepare_dataset(self, dataset: RowDataset, *_: Any) -> RowDataset:
        """Nothing to prepare. TRL's DPO trainer, unlike its others, has no path for rows that hold token ids."""
        return dataset


def run(config: Config, context: Context) -> StageResult:
    """Loads the policy, and once more as the frozen reference, trains on pairs, measures, commits. With adapters the
    reference is the same model with its adapter off."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    dataset = load_rows(config.data, Role.PREFERENCES, context)
    opened = open_policy(context.input("policy"), config.data.template, quantise=config.quantise)
    reference = None if config.lora else open_policy(context.input("policy"), config.data.template).model
    convert = partial(preference_row, opened.renderer)
    train, too_long = token_rows(dataset.train, convert, config, context.job.stage)
    held_out, _ = token_rows(dataset.held_out, convert, config, context.job.stage)
    evaluation = EvaluationSettings.model_validate(context.job.evaluation)
    own = [Prompt(row.prompt, row.source) for row in dataset.held_out]
    prompts = held_out_prompts(evaluation, own, [Prompt(row.prompt, row.source) for row in dataset.train])

    model = add_lora(opened.model, config.lora) if config.lora else opened.model
    arguments = trainer_arguments(config, context, config.optim, len(train))
    trainer = PreferenceTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(**arguments, max_length=None, beta=config.beta, loss_type=[config.loss]),
        train_dataset=RowDataset.from_list(train),
        processing_class=opened.tokenizer,
    )
    if config.lora:
        # TRL made a frozen copy of the adapter for the reference, and with two adapters a resumed run silently loses
        # the trained one. Without the copy TRL switches the adapter off: exact, because it was fresh (B = 0).
        model.delete_adapter("ref")
    run_training(
        trainer,
        context,
        keep_checkpoints=config.checkpoint.keep,
        shown={"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"},
        sample=sampler(context, evaluation, model, opened.renderer, prompts),
        samples_every=config.samples_every,
    )
    probes = [row["prompt_ids"] + row["chosen_ids"] for row in (held_out or train)[:NUM_PROBES]]
    trained = trainable_parameters(model)
    ours = causal_role(model)
    theirs = replace(ours, switch=model.disable_adapter) if config.lora else causal_role(reference)
    folder = Path(local_folder(context.input("policy")))
    metrics = evaluate_model(context, evaluation, model, folder, opened.renderer, prompts, theirs)
    if held_out:
        metrics |= preference_metrics(ours, theirs, held_out, opened.renderer.pad_id)
    _, handover = commit_policy(context.commit_model(), model, opened, probes)
    counts = {"rows": len(train), "rows_too_long": too_long, "rows_skipped": len(dataset.report.skipped)}
    return StageResult({**metrics, "trained_parameters": trained, **counts}, handover)
