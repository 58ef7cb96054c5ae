"""The policy-gradient stages (ppo, rloo, grpo): opens the models, runs the loop, measures and commits the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from rich.console import Console
from rich.markup import escape
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align import ranks
from align.context import Context
from align.data.load import load
from align.data.render import Renderer
from align.data.rows import Prompt
from align.data.split import places
from align.errors import ConfigError, DataError, DistributedError, Problem
from align.evaluation.policy import load_gold
from align.evaluation.scorer import RewardScorer
from align.evaluation.stage import evaluate_stage, held_out_prompts
from align.generation.engine import RolloutEngine
from align.generation.open import Sampled, open_engine
from align.job import StageResult
from align.models.handover import NUM_PROBES
from align.models.load import local_folder
from align.models.opened import Opened, commit_policy
from align.models.partitioned import make_whole
from align.recipe.data_settings import Role
from align.recipe.engine_settings import EvaluationSettings
from align.rewards.functions import call_function, load_function
from align.rewards.remote import RemoteReward
from align.rewards.settings import RewardTerm
from align.training import fsdp
from align.training.masked import Processes
from align.training.precision import set_tf32, training_dtype
from align.training.rows import TokenRow, demonstration_row, load_rows
from align.training.strategy import new_optimiser
from stages.ppo.config import Config
from stages.ppo.loop import Loop, Question
from stages.ppo.models import Models, open_models, shard
from stages.ppo.ptx import Demonstrations
from stages.ppo.scorer import Rewarder, TextScorer
from stages.ppo.trainer import PPOTrainer

WARMUP_ROLLOUTS = 20
"""Of a critic that starts from nothing (VAPO, Yue et al. 2025, takes 50), but at most a tenth of the stage."""


def run(config: Config, context: Context) -> StageResult:
    """Improves the policy rollout by rollout."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    set_tf32(config.tf32)
    accelerator = new_accelerator(context)
    dataset = load_rows(config.data, Role.PROMPTS, context)
    evaluation = EvaluationSettings.model_validate(context.job.evaluation)
    trained_on = chain(dataset.train, load(config.ptx.data, Role.PROMPTS).train if config.ptx else ())
    prompts = held_out_prompts(evaluation, dataset.held_out, places(trained_on))
    texts = text_scorers(config, context)

    models = open_models(config, context, accelerator.device)
    shard(models)
    policy = models.policy
    questions, too_long = training_questions(policy, dataset.train, config)
    rewarder = new_rewarder(config, models, texts)
    rewarder.check([question.messages for question in questions])
    trainer = PPOTrainer(
        config,
        models.actor,
        models.critic,
        models.reference,
        seed=context.seed("minibatches"),
        warmup=warmup_rollouts(config, models),
        processes=Processes(ranks.total, ranks.highest),
        precision=training_dtype(config.precision),
        demonstrations=new_demonstrations(config, context, policy, accelerator),
        new_optimiser=new_optimiser,
    )
    engine = new_engine(config, context, policy, longest_sequence(policy, questions, config, prompts, evaluation))
    loop = Loop(
        config,
        context,
        accelerator,
        trainer,
        engine,
        rewarder,
        policy.renderer,
        questions,
        gold=load_gold(evaluation.gold),
        max_training_score=models.max_training_score,
    )
    with closing(engine):
        done = loop.run()
        if trainer.ema is not None:
            trainer.ema.apply()
        make_whole(policy.model)
        fsdp.leave(policy.model)
        loop.sync()
        probes = loop.sample_sequences(NUM_PROBES)
        metrics = evaluate_stage(
            context,
            evaluation,
            engine,
            models.actor,
            policy.renderer,
            prompts,
            reference=models.reference,
            scorer=rewarder.total,
        )
        _, handover = commit_policy(context.commit_model(), policy.model, policy, probes)
    for tracker in accelerator.trackers:
        tracker.finish()
    counts = {
        "rollouts": done,
        "optimiser_steps": trainer.num_steps,
        "prompts_trained": len(questions),
        "prompts_too_long": too_long,
    }
    return StageResult({**metrics, **counts}, handover)


def new_accelerator(context: Context) -> Accelerator:
    """Processes, device and trackers. Raises DistributedError when the processes are not those that were started."""
    folders = ProjectConfiguration(str(context.directory), logging_dir=str(context.directory / "tracking"))
    trackers: list[Any] = list(context.job.track)
    fsdp.allow_on_cpu()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=trackers or None, project_config=folders)
    unset_hf_deepspeed_config()  # weights are checked when they are loaded, and parted later
    if accelerator.num_processes != context.processes:
        raise DistributedError(
            f"{context.job.stage}: {context.processes} processes were started, and {accelerator.num_processes} "
            "found each other"
        )
    return accelerator


def new_engine(config: Config, context: Context, policy: Opened, max_length: int) -> RolloutEngine:
    """The rollout engine the recipe asks for."""
    console = Console(stderr=True, highlight=False, quiet=not context.is_main)
    what = Sampled(
        policy.model,
        Path(local_folder(context.input("policy"))),
        training_dtype(config.precision),
        max_length,
        config.rollout.micro_batch_size,
        config.rollout.overlap,
    )
    return open_engine(
        config.rollout,
        what,
        notice=lambda text: console.print(f"  rollouts: {escape(text)}"),
        log=context.directory / ("vllm.log" if context.is_main else f"vllm-{ranks.rank()}.log"),
        end=context.abort,
    )


def longest_sequence(
    policy: Opened,
    questions: Sequence[Question],
    config: Config,
    prompts: Sequence[Prompt],
    evaluation: EvaluationSettings,
) -> int:
    """Tokens of the longest prompt and response that the engine will see, in training and evaluation; at most the
    policy's context."""
    context = getattr(policy.model.config, "max_position_embeddings", None)
    trained = max(len(question.ids) for question in questions) + config.rollout.max_response_tokens
    asked = [len(policy.renderer.prompt(prompt.messages, prompt.source)) for prompt in prompts]
    longest = max(trained, max(asked, default=0) + evaluation.max_response_tokens)
    return min(longest, context or longest)


def new_rewarder(config: Config, models: Models, texts: Mapping[str, TextScorer]) -> Rewarder:
    """The reward: a scorer for each reward model, and the functions and endpoints."""
    batch_size = config.rollout.micro_batch_size
    scorers = {name: RewardScorer(model, models.policy, batch_size) for name, model in models.rewards.items()}
    by_term = {term: [scorers[name] for name in settings.inputs(term)] for term, settings in config.reward.items()}
    return Rewarder(config.reward, by_term, texts, models.policy.renderer)


def text_scorers(config: Config, context: Context) -> dict[str, TextScorer]:
    """The function or endpoint of each term that has one. Raises ConfigError when one cannot be used."""
    return {
        term: text_scorer(f"{context.job.stage}.reward.{term}", settings, context)
        for term, settings in config.reward.items()
        if not settings.is_model
    }


def text_scorer(where: str, settings: RewardTerm, context: Context) -> TextScorer:
    """The function or the endpoint of a term. Raises ConfigError when it cannot be used."""
    if settings.function is not None:
        return partial(call_function, load_function(settings.function, where), where=where)
    notice = partial(
        Console(stderr=True, quiet=not context.is_main).print, style="yellow", markup=False, highlight=False
    )
    return RemoteReward(settings, where, should_stop=lambda: context.stop.is_set, notice=notice)


def new_demonstrations(
    config: Config, context: Context, policy: Opened, accelerator: Accelerator
) -> Demonstrations | None:
    """What PPO-ptx mixes in. Raises DataError when no row is short enough."""
    if config.ptx is None:
        return None
    renderer = Renderer(policy.tokenizer, config.ptx.data.template)
    dataset = load_rows(config.ptx.data, Role.DEMONSTRATIONS, context)
    rows = [demonstration_row(renderer, row) for row in dataset.train]
    turns = [turn for row in rows if len(row["input_ids"]) <= config.ptx.max_length for turn in assistant_turns(row)]
    if not turns:
        raise DataError(Problem("ptx.data", f"none of {len(rows)} rows has at most {config.ptx.max_length} tokens"))
    here = (accelerator.device, accelerator.process_index, accelerator.num_processes)
    return Demonstrations(turns, config.ptx.batch_size, context.seed("ptx"), renderer.pad_id, *here)


def assistant_turns(row: TokenRow) -> list[tuple[list[int], list[int]]]:
    """What came before and what was said, for every turn of the assistant in a conversation."""
    ids, is_said = row["input_ids"], [label != -100 for label in row["labels"]]
    edges = [at for at in range(1, len(ids)) if is_said[at] != is_said[at - 1]] + [len(ids)]
    return [(ids[:start], ids[start:end]) for start, end in pairwise(edges) if is_said[start]]


def warmup_rollouts(config: Config, models: Models) -> int:
    """Rollouts on which only the critic is trained."""
    if models.critic is None:
        return 0
    if config.critic.warmup_rollouts is not None:
        return config.critic.warmup_rollouts
    return 0 if models.critic_is_informed else min(WARMUP_ROLLOUTS, config.rollouts // 10)


def training_questions(policy: Opened, prompts: Sequence[Prompt], config: Config) -> tuple[list[Question], int]:
    """Each different prompt that is short enough, and how many are not. Prompts are never cut.

    Raises DataError when none is left, ConfigError when prompt and response together exceed the model's context.
    """
    unique: dict[tuple[int, ...], Question] = {}
    for prompt in prompts:
        ids = policy.renderer.prompt(prompt.messages, prompt.source)
        unique.setdefault(tuple(ids), Question(prompt.messages, ids))
    questions = [question for question in unique.values() if len(question.ids) <= config.max_prompt_tokens]
    if not questions:
        raise DataError(
            Problem("ppo.data", f"none of {len(unique)} prompts has at most {config.max_prompt_tokens} tokens")
        )
    longest = max(len(question.ids) for question in questions) + config.rollout.max_response_tokens
    context = getattr(policy.model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ConfigError(
            f"ppo: the longest prompt and rollout.max_response_tokens come to {longest} tokens, the policy's context "
            f"is {context}; lower rollout.max_response_tokens or max_prompt_tokens"
        )
    return questions, len(unique) - len(questions)
