"""Direct preference optimisation and its relatives, on token ids that our own renderer made."""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed

from align.context import Context
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
from align.training.responses import Reference, open_reference, reference_role, warn_of_displacement
from align.training.rows import preference_row
from align.training.sharding import loading
from align.training.trainer import run_training, trainer_arguments
from stages.dpo.config import Config
from stages.dpo.trainer import PreferenceTrainer, held_out_metrics


def run(config: Config, context: Context) -> StageResult:
    """Loads the policy, trains on pairs, measures, commits."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    template = config.data.template
    with loading(config):
        opened = open_policy(context.input("policy"), template, quantise=config.quantise)
    rows = prepared(config.data, Role.PREFERENCES, opened.renderer, preference_row, config, context)
    evaluation = EvaluationSettings.model_validate(context.job.evaluation)
    prompts = held_out_prompts(evaluation, rows.prompts, rows.trained_on)

    model = add_lora(opened.model, config.lora) if config.lora else opened.model
    prepare_passes(model, config)
    sample = sampler(context, evaluation, model, opened.renderer, prompts)
    reference = Reference(is_needed=False)
    if config.needs_reference:
        with loading(config):
            reference = open_reference(context, config, template, precompute=config.precompute_reference)
    arguments = trainer_arguments(config, context, config.optim, len(rows.train))
    run_training(
        # Held by nothing else: trainer and optimiser are gone afterwards, and there is room for measuring.
        PreferenceTrainer(config, model, reference, arguments, rows.train.table, opened.tokenizer),
        context,
        keep_checkpoints=config.checkpoint.keep,
        shown={"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"},
        sample=sample,
        samples_every=config.samples_every,
    )
    probes = [row["prompt_ids"] + row["chosen_ids"] for row in (rows.held_out or rows.train)[:NUM_PROBES]]
    trained = trainable_parameters(model)
    ours = causal_role(model)
    theirs = reference_role(reference, context, template, model) if config.needs_reference else None
    folder = Path(local_folder(context.input("policy")))
    metrics = evaluate_model(context, evaluation, model, folder, opened.renderer, prompts, theirs)
    if rows.held_out:
        metrics |= held_out_metrics(config, ours, theirs, rows.held_out, opened.renderer.pad_id)
        warn_of_displacement(context.job.stage, "chosen", metrics.get("chosen_log_ratio"))
    _, handover = commit_policy(context.commit_model(), model, opened, probes)
    return StageResult({**metrics, "trained_parameters": trained, **rows.counts}, handover)
