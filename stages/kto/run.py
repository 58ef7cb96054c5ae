"""Kahneman-Tversky optimisation on token ids that our own renderer made."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset as Table
from transformers import set_seed

from align.context import Context
from align.errors import DataError, Problem
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
from align.training.responses import open_reference, reference_role, warn_of_displacement
from align.training.rows import judgement_row
from align.training.trainer import run_training, trainer_arguments
from stages.kto.config import Config
from stages.kto.losses import class_weights
from stages.kto.trainer import JudgementTrainer, Weighing, held_out_metrics, with_mismatches


def run(config: Config, context: Context) -> StageResult:
    """Loads the policy, trains on judged answers, measures, commits."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    template = config.data.template
    opened = open_policy(context.input("policy"), template, quantise=config.quantise)
    rows = prepared(config.data, Role.JUDGEMENTS, opened.renderer, judgement_row, config, context)
    evaluation = EvaluationSettings.model_validate(context.job.evaluation)
    own = list({str(prompt.messages): prompt for prompt in rows.prompts}.values())
    prompts = held_out_prompts(evaluation, own, rows.trained_on)

    weighing = weigh(config, rows.train.table, context.job.stage)
    model = add_lora(opened.model, config.lora) if config.lora else opened.model
    prepare_passes(model, config)
    reference = open_reference(context, config, template, precompute=config.precompute_reference)
    sample = sampler(context, evaluation, model, opened.renderer, prompts)
    arguments = trainer_arguments(config, context, config.optim, len(rows.train))
    train = with_mismatches(rows.train.table, config.max_length, context.seed("mismatches"))
    run_training(
        # Held by nothing else: trainer and optimiser are gone afterwards, and there is room for measuring.
        JudgementTrainer(weighing, model, reference, arguments, train, opened.tokenizer),
        context,
        keep_checkpoints=config.checkpoint.keep,
        shown={"loss": "loss", "kl": "KL", "rewards/good": "good", "rewards/bad": "bad"},
        sample=sample,
        samples_every=config.samples_every,
    )
    probes = [row["prompt_ids"] + row["response_ids"] for row in (rows.held_out or rows.train)[:NUM_PROBES]]
    counts = {
        "good_weight": weighing.good_weight,
        "bad_weight": weighing.bad_weight,
        "trained_parameters": trainable_parameters(model),
        **rows.counts,
    }
    ours, theirs = causal_role(model), reference_role(reference, context, template, model)
    folder = Path(local_folder(context.input("policy")))
    metrics = evaluate_model(context, evaluation, model, folder, opened.renderer, prompts, theirs)
    if rows.held_out:
        metrics |= held_out_metrics(ours, theirs, rows.held_out, opened.renderer.pad_id)
        warn_of_displacement(context.job.stage, "good", metrics.get("good_log_ratio"))
    _, handover = commit_policy(context.commit_model(), model, opened, probes)
    return StageResult({**metrics, **counts}, handover)


def weigh(config: Config, rows: Table, stage: str) -> Weighing:
    """The weights of good and bad answers in these rows. Raises DataError when there is no good or no bad one."""
    num_good = sum(rows["is_good"])
    if num_good in (0, len(rows)):
        missing = "bad" if num_good else "good"
        raise DataError(
            Problem(stage, f"none of {len(rows)} answers is {missing}", "KTO learns from the difference: add some")
        )
    balance = class_weights(num_good, len(rows) - num_good) if config.balance else (1.0, 1.0)
    return Weighing(config.beta, config.good_weight * balance[0], config.bad_weight * balance[1])
