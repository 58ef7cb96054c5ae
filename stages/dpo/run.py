"""Direct preference optimisation and its relatives, on token ids that our own renderer made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset as RowDataset
from transformers import set_seed

from align.context import Context
from align.data.rows import Prompt
from align.evaluation.stage import evaluate_model, held_out_prompts, sampler
from align.job import StageResult
from align.models.handover import NUM_PROBES
from align.models.load import local_folder
from align.models.lora import add_lora, trainable_parameters
from align.models.opened import Opened, commit_policy, open_policy
from align.models.roles import causal_role
from align.recipe.settings import EvaluationSettings, Role
from align.training.responses import Reference, open_reference, reference_role, warn_of_displacement
from align.training.rows import TokenRow, load_rows, preference_row, token_rows
from align.training.trainer import run_training, trainer_arguments
from stages.dpo.config import Config
from stages.dpo.trainer import PreferenceTrainer, held_out_metrics


def run(config: Config, context: Context) -> StageResult:
    """Loads the policy, trains on pairs, measures, commits."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    template = config.data.template
    dataset = load_rows(config.data, Role.PREFERENCES, context)
    opened = open_policy(context.input("policy"), template, quantise=config.quantise)
    convert = partial(preference_row, opened.renderer)
    train, too_long = token_rows(dataset.train, convert, config, context.job.stage)
    held_out, _ = token_rows(dataset.held_out, convert, config, context.job.stage)
    evaluation = EvaluationSettings.model_validate(context.job.evaluation)
    own = [Prompt(row.prompt, row.source) for row in dataset.held_out]
    prompts = held_out_prompts(evaluation, own, [Prompt(row.prompt, row.source) for row in dataset.train])

    model = add_lora(opened.model, config.lora) if config.lora else opened.model
    sample = sampler(context, evaluation, model, opened.renderer, prompts)
    reference = Reference(is_needed=False)
    if config.needs_reference:
        reference = open_reference(
            context, template, precompute=config.precompute_reference, has_adapter=bool(config.lora)
        )
    train_policy(config, context, model, reference, opened, train, sample)
    probes = [row["prompt_ids"] + row["chosen_ids"] for row in (held_out or train)[:NUM_PROBES]]
    counts = {
        "trained_parameters": trainable_parameters(model),
        "rows": len(train),
        "rows_too_long": too_long,
        "rows_skipped": len(dataset.report.skipped),
    }
    ours = causal_role(model)
    theirs = reference_role(reference, context, template, model) if config.needs_reference else None
    folder = Path(local_folder(context.input("policy")))
    metrics = evaluate_model(context, evaluation, model, folder, opened.renderer, prompts, theirs)
    if held_out:
        metrics |= held_out_metrics(config, ours, theirs, held_out, opened.renderer.pad_id)
        warn_of_displacement(context.job.stage, "chosen", metrics.get("chosen_log_ratio"))
    _, handover = commit_policy(context.commit_model(), model, opened, probes)
    return StageResult({**metrics, **counts}, handover)


def train_policy(
    config: Config,
    context: Context,
    model: Any,
    reference: Reference,
    opened: Opened,
    train: Sequence[TokenRow],
    sample: Callable[[int], None],
) -> None:
    """Trains `model` in place. The trainer, with its optimiser, is gone afterwards: there is room for measuring."""
    trainer = PreferenceTrainer(
        model,
        reference,
        trainer_arguments(config, context, config.optim, len(train)),
        RowDataset.from_list(list(train)),
        opened.tokenizer,
    )
    trainer.config = config
    run_training(
        trainer,
        context,
        keep_checkpoints=config.checkpoint.keep,
        shown={"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"},
        sample=sample,
        samples_every=config.samples_every,
    )
