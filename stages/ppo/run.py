"""PPO from human feedback: opens the models, runs the loop, commits and measures the policy."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from transformers import set_seed

from align.context import Context
from align.errors import ConfigError, DataError, Problem
from align.evaluation.stage import evaluate_stage, held_out_prompts
from align.generation.engine import RolloutEngine
from align.generation.transformers_engine import TransformersEngine
from align.job import StageResult
from align.models.handover import NUM_PROBES
from align.models.opened import Opened, commit_policy, open_policy, open_reward
from align.models.value import ValueModel, critic_from_policy, critic_from_reward
from align.recipe.settings import EvaluationSettings, Role
from align.training.masked import Processes
from align.training.rows import load_rows
from align.training.trainer import training_dtype
from stages.ppo.config import Config, RolloutSettings
from stages.ppo.loop import Loop, Question
from stages.ppo.scorer import RewardScorer
from stages.ppo.trainer import PPOTrainer


def run(config: Config, context: Context) -> StageResult:
    """Improves the policy rollout by rollout."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    accelerator = new_accelerator(context)
    dataset = load_rows(config.data, Role.PROMPTS, context)
    policy, reference, reward = (
        open_model(context.input(slot), config.data.template)
        for slot, open_model in (("policy", open_policy), ("reference", open_policy), ("reward", open_reward))
    )
    questions, too_long = training_questions(policy, dataset.train, config)
    evaluation = EvaluationSettings.model_validate(context.job.evaluation)
    prompts = held_out_prompts(evaluation, dataset.held_out, dataset.train)

    scorer = RewardScorer(reward, policy, config.rollout.micro_batch_size)
    scorer.check_prompts([question.messages for question in questions])
    critic = new_critic(context, policy, scorer)
    for model in (policy.model, reference.model, reward.model, critic):
        model.to(accelerator.device)
    reference.model.eval().requires_grad_(False)
    if config.gradient_checkpointing:
        for model in (policy.model, critic):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = PPOTrainer(
        config,
        policy.model.train(),
        critic.train(),
        reference.model,
        seed=context.seed("minibatches"),
        processes=all_processes(accelerator),
        precision=training_dtype(config.precision),
    )
    engine = new_engine(config.rollout, policy)
    loop = Loop(config, context, accelerator, trainer, engine, scorer, policy.renderer, questions)
    loop.run()

    probes = loop.sample_sequences(NUM_PROBES)
    effective, handover = commit_policy(context.commit_model(), policy.model, policy, probes)
    metrics = evaluate_stage(
        context, evaluation, effective, policy.renderer, prompts, reference=reference.model, scorer=scorer
    )
    counts = {"optimiser_steps": trainer.num_steps, "prompts_trained": len(questions), "prompts_too_long": too_long}
    return StageResult({**metrics, **counts}, handover)


def new_accelerator(context: Context) -> Accelerator:
    """Processes, device and trackers."""
    folders = ProjectConfiguration(str(context.directory), logging_dir=str(context.directory / "tracking"))
    trackers: list[Any] = list(context.job.track)
    return Accelerator(cpu=not torch.cuda.is_available(), log_with=trackers or None, project_config=folders)


def new_critic(context: Context, policy: Opened, scorer: RewardScorer) -> ValueModel:
    """The critic starts from the reward model; from the policy when the two do not share a tokenizer."""
    if scorer.shares_tokenizer:
        return critic_from_reward(context.input("reward"), policy.tokenizer, torch.float32)
    return critic_from_policy(context.input("policy"), policy.tokenizer, torch.float32)


def new_engine(settings: RolloutSettings, policy: Opened) -> RolloutEngine:
    """The rollout engine the recipe asks for."""
    return TransformersEngine(policy.model, settings.micro_batch_size)


def training_questions(policy: Opened, prompts: list, config: Config) -> tuple[list[Question], int]:
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


def all_processes(accelerator: Accelerator) -> Processes:
    """Sums and maxima over the processes of an accelerator."""
    return Processes(
        sum=lambda tensor: accelerator.reduce(tensor, "sum"),  # type: ignore[return-value]
        max=lambda tensor: accelerator.gather(tensor).max()[None],  # type: ignore[union-attr]
    )
