"""The loop of PPO: sample -> score -> reference and values -> advantages -> epochs of minibatches -> sync."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape

from align.context import Context
from align.data.render import Renderer
from align.data.rows import Message
from align.errors import NumericError
from align.generation.engine import RolloutEngine, Samples, Sampling
from align.models.load import HIGHEST_FIELD
from align.training.progress import StageProgress
from stages.ppo import alarms
from stages.ppo.checkpoint import load_checkpoint, save_checkpoint
from stages.ppo.config import Config
from stages.ppo.rollout import Rollout, join
from stages.ppo.scorer import RewardScorer
from stages.ppo.trainer import PPOTrainer, rollout_metrics

SAMPLES_SHOWN = 4


@dataclass(frozen=True)
class Question:
    """A training prompt: its messages, for a reward model with another template, and its token ids."""

    messages: Sequence[Message]
    ids: list[int]


class Loop:
    """Everything that happens once per rollout, in the order in which it happens (see `rollout`)."""

    def __init__(
        self,
        config: Config,
        context: Context,
        accelerator: Accelerator,
        trainer: PPOTrainer,
        engine: RolloutEngine,
        scorer: RewardScorer,
        renderer: Renderer,
        questions: Sequence[Question],
    ):
        self.config, self.context, self.accelerator = config, context, accelerator
        self.trainer, self.engine, self.scorer = trainer, engine, scorer
        self.renderer, self.questions = renderer, questions
        self.history = alarms.History()
        self.console = Console(stderr=True, quiet=not accelerator.is_main_process)

    def run(self) -> None:
        """All rollouts, from the newest checkpoint that verifies. Raises Interrupted after a signal."""
        config, context = self.config, self.context
        start, self.history = load_checkpoint(context, self.trainer)
        self.engine.sync()
        context.metrics.truncate_after(start)
        context.samples.truncate_after(start)
        checkpoint_every = config.checkpoint.every_steps or math.ceil(config.rollouts / 10)
        self.console.print(f"  rollouts: {self.engine.name}", highlight=False)
        self.accelerator.init_trackers(context.job.stage, config=None)
        with StageProgress(
            context.job.stage, config.rollouts, "rollouts", enabled=self.accelerator.is_main_process
        ) as bar:
            for index in range(start, config.rollouts):
                metrics = self.rollout(index)
                done = index + 1
                self.report(done, metrics, bar)
                if done % checkpoint_every == 0 or context.stop.is_set:
                    save_checkpoint(context, self.trainer, self.history, done, config.checkpoint.keep)
                if context.stop.is_set and done < config.rollouts:
                    context.stop_here(done)
        self.accelerator.end_training()

    def rollout(self, index: int) -> dict[str, float]:
        """One round: sample, score, observe, improve, sync. Returns its metrics."""
        started = time.monotonic()
        questions = self.batch(index)
        samples = self.sample(questions, f"rollout {index}")
        raw_scores = self.scorer([one.messages for one in questions], [one.ids for one in questions], samples)
        device = self.accelerator.device
        responses = join([one.ids for one in questions], samples, self.renderer.pad_id, device)
        rollout = self.trainer.observe(responses, raw_scores.to(device))
        if index == 0 and self.starts_at_reference():
            difference = (rollout.logp_old - rollout.logp_ref).abs().max()
            alarms.check_starts_at_reference(float(difference), self.trainer.rounding)
        observed = rollout_metrics(rollout, self.config.kl.coef, raw_scores.to(device), self.trainer.processes)
        improved = self.trainer.improve(rollout, index)
        self.engine.sync()
        self.write_samples(index, questions, samples, raw_scores, rollout)
        episode = (index + 1) * self.config.rollout.prompts
        speed = self.config.rollout.prompts / (time.monotonic() - started)
        return {
            **observed,
            "objective/kl_coef": self.config.kl.coef,
            **improved,
            "episode": float(episode),
            "eps": speed,
        }

    def starts_at_reference(self) -> bool:
        """Whether the reference is the very model that the policy starts from."""
        return self.context.input("policy").fingerprint == self.context.input("reference").fingerprint

    def batch(self, index: int) -> list[Question]:
        """This process's prompts of rollout `index`. Prompts are visited in a fresh order on every pass."""
        count, total = self.config.rollout.prompts, len(self.questions)
        order: list[int] = []
        for number in range(index * count // total, ((index + 1) * count - 1) // total + 1):
            generator = torch.Generator().manual_seed(self.context.seed(f"prompts {number}"))
            order += torch.randperm(total, generator=generator).tolist()
        start = index * count % total
        picked = order[start : start + count]
        return [self.questions[one] for one in picked[self.accelerator.process_index :: self.accelerator.num_processes]]

    def sample(self, questions: Sequence[Question], name: str) -> Samples:
        """One response per question; every process draws its own."""
        rollout = self.config.rollout
        seed = self.context.seed(f"{name}, process {self.accelerator.process_index}")
        sampling = Sampling(
            rollout.max_response_tokens,
            rollout.temperature,
            self.renderer.stop_ids,
            self.renderer.pad_id,
            seed,
        )
        return self.engine.generate([one.ids for one in questions], sampling)

    def sample_sequences(self, count: int) -> list[list[int]]:
        """Whole sequences of the trained policy, prompt and response, as probes for the hand-over check."""
        questions = self.questions[:count]
        samples = self.sample(questions, "probes")
        return [one.ids + response for one, response in zip(questions, samples.rows(), strict=True)]

    def report(self, done: int, metrics: dict[str, float], bar: StageProgress) -> None:
        """metrics.jsonl, trackers, progress bar and alarms."""
        highest = getattr(self.scorer.reward.model.config, HIGHEST_FIELD, None)
        cap = self.config.rollout.max_response_tokens
        raised, self.history = alarms.check(metrics, self.history, cap, max_training_score=highest)
        if self.accelerator.is_main_process:
            self.context.metrics.write(done, **metrics, alarms=[alarm.name for alarm in raised])
        self.accelerator.log(metrics, step=done)
        bar.show(
            done,
            reward=metrics["objective/scores"],
            kl=metrics["objective/kl"],
            length=metrics["val/response_length"],
            eos=metrics["val/eos_rate"],
        )
        for alarm in raised:
            if alarm.fatal:
                raise NumericError(f"{self.context.job.stage}, rollout {done}: {alarm.message}")
            self.console.print(f"  [yellow]{self.context.job.stage}, rollout {done}:[/] {escape(alarm.message)}")

    def write_samples(
        self,
        index: int,
        questions: Sequence[Question],
        samples: Samples,
        raw_scores: torch.Tensor,
        rollout: Rollout,
    ) -> None:
        """A few responses of this rollout to samples.jsonl, at fixed rollouts."""
        every = self.config.samples_every or math.ceil(self.config.rollouts / 10)
        if index % every or not self.accelerator.is_main_process:
            return
        kl = torch.where(rollout.responses.mask, rollout.logp_old - rollout.logp_ref, 0).sum(1)
        for row, response in enumerate(samples.rows()[:SAMPLES_SHOWN]):
            self.context.samples.write(
                index + 1,
                at="rollout",
                prompt=questions[row].messages[-1]["content"],
                response=self.renderer.decode(response),
                finished=bool(samples.finished[row]),
                reward=float(raw_scores[row]),
                score=float(rollout.scores[row]),
                kl=float(kl[row]),
            )
