"""The loop of PPO: sync -> sample -> score -> reference and values -> advantages -> epochs of minibatches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape

from align.context import Context
from align.data.render import Renderer
from align.data.rows import Message
from align.errors import ConfigError, Interrupted, NumericError, RolloutError
from align.evaluation.policy import GoldScorer
from align.generation.engine import RolloutEngine, Samples, Sampling
from align.training.parity import NUM_PROBES, ParityGuard
from align.training.progress import StageProgress
from stages.ppo import alarms
from stages.ppo.checkpoint import load_checkpoint, save_checkpoint
from stages.ppo.config import Config
from stages.ppo.correction import correction_metrics, importance_weights
from stages.ppo.metrics import distinct_ngrams, mismatch, rollout_metrics
from stages.ppo.packing import visited
from stages.ppo.rollout import Rollout, join
from stages.ppo.scorer import Rewarder, Scores
from stages.ppo.trainer import PPOTrainer

SAMPLES_SHOWN = 4


@dataclass(frozen=True)
class Question:
    """A training prompt: its messages, for a reward model with another template, and its token ids."""

    messages: Sequence[Message]
    ids: list[int]


@dataclass
class Phases:
    """Seconds of the phases of a rollout, as metrics. A GPU may still be at work when a phase ends."""

    metrics: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is done inside, under the metric's name."""
        started = time.monotonic()
        yield
        self.metrics[name] = time.monotonic() - started


class Loop:
    """Everything that happens once per rollout, in the order in which it happens (see `rollout`)."""

    def __init__(
        self,
        config: Config,
        context: Context,
        accelerator: Accelerator,
        trainer: PPOTrainer,
        engine: RolloutEngine,
        rewarder: Rewarder,
        renderer: Renderer,
        questions: Sequence[Question],
        *,
        gold: GoldScorer | None = None,
        max_training_score: float | None = None,
    ):
        self.config, self.context, self.accelerator = config, context, accelerator
        self.trainer, self.engine, self.rewarder = trainer, engine, rewarder
        self.renderer, self.questions = renderer, questions
        self.gold = gold
        facts = {
            "max_response_tokens": config.rollout.max_response_tokens,
            "clip_value": config.clip.value,
            "max_training_score": max_training_score,
        }
        self.facts = {name: float(value) for name, value in facts.items() if value is not None}
        self.history = alarms.History()
        self.console = Console(stderr=True, quiet=not accelerator.is_main_process)

    def run(self) -> int:
        """All rollouts, from the newest checkpoint that verifies. Returns their number: fewer than the recipe's when
        the KL budget is spent. Raises Interrupted after a signal."""
        config, context = self.config, self.context
        start, self.history = load_checkpoint(context, self.trainer)
        context.metrics.truncate_after(start)
        context.samples.truncate_after(start)
        checkpoint_every = config.checkpoint.every_steps or math.ceil(config.rollouts / 10)
        self.console.print(f"  rollouts: {self.engine.name}, {self.engine.summary}", highlight=False)
        self.accelerator.init_trackers(context.job.stage, config=None)
        done = start
        with StageProgress(
            context.job.stage, config.rollouts, "rollouts", enabled=self.accelerator.is_main_process
        ) as bar:
            for index in range(start, config.rollouts):
                metrics, spent = self.rollout(index)
                done = index + 1
                self.report(done, metrics, bar)
                if spent:
                    self.budget_spent(done, metrics["objective/kl"])
                    break
                if done % checkpoint_every == 0 or context.stop.is_set:
                    self.save(done)
                if context.stop.is_set and done < config.rollouts:
                    context.stop_here(done)
        self.save(done)  # the policy is still to be measured, which may fail
        return done

    @cached_property
    def guard(self) -> ParityGuard:
        """Compares the engine with the policy."""
        probes = [question.ids for question in self.questions[:NUM_PROBES]]
        trainer = self.trainer
        return ParityGuard(
            self.engine, trainer.actor, probes, self.sampling("parity"), trainer.precision, trainer.autocast
        )

    def sync(self) -> None:
        """The engine samples from the policy as it is now. Raises RolloutError when it does not."""
        self.engine.sync()
        self.guard.check()

    def budget_spent(self, done: int, kl: float) -> None:
        """Says that the stage ends here. Raises ConfigError when nothing was learned yet."""
        stage, budget = self.context.job.stage, self.config.kl.budget
        if self.trainer.num_steps == 0:
            raise ConfigError(
                f"{stage}: the policy starts at a KL of {kl:.3g} to the reference, above kl.budget {budget:g}; raise it"
            )
        self.console.print(
            f"  {stage}, rollout {done}: KL {kl:.3g} is above kl.budget {budget:g}: done", highlight=False
        )

    def save(self, done: int) -> None:
        """A checkpoint after `done` rollouts."""
        save_checkpoint(self.context, self.trainer, self.history, done, self.config.checkpoint.keep)

    def rollout(self, index: int) -> tuple[dict[str, float], bool]:
        """One round: sync, sample, score, observe, improve. Returns its metrics, and whether the KL budget is spent:
        then the round is not learned from."""
        started, phases = time.monotonic(), Phases()
        try:
            with phases.phase("time/sync"):
                self.sync()
            questions = self.batch(index)
            with phases.phase("time/rollout"):
                samples = self.sample(questions, f"rollout {index}")
            with phases.phase("time/score"):
                scores = self.rewarder([one.messages for one in questions], [one.ids for one in questions], samples)
        except (Interrupted, RolloutError):  # an engine or an endpoint is down: what was learned before is kept
            if index > 0:
                self.save(index)
            raise
        device, processes = self.accelerator.device, self.trainer.processes
        responses = join([one.ids for one in questions], samples, self.renderer.pad_id, device)
        with phases.phase("time/observe"):
            rollout = self.trainer.observe(responses, scores.tokens.to(device))
        if index == 0 and self.starts_at_reference():
            difference = (rollout.logp_old - rollout.logp_ref).abs().max()
            alarms.check_starts_at_reference(float(difference), self.trainer.rounding)
        metrics = rollout_metrics(rollout, self.trainer.kl_coef, scores, processes)
        metrics |= self.text_metrics(questions, samples)
        if samples.logprobs is not None:
            metrics |= mismatch(samples.logprobs, rollout, processes)
            settings = self.config.rollout
            weights = importance_weights(samples.logprobs, rollout, settings.correction, settings.correction_cap)
            metrics |= correction_metrics(weights, rollout, processes)
            rollout = replace(rollout, advantages=rollout.advantages * weights)
        budget = self.config.kl.budget
        spent = budget is not None and metrics["objective/kl"] > budget
        if not spent:
            with phases.phase("time/learn"):
                metrics |= self.trainer.improve(rollout, index)
            self.trainer.adapt(metrics["objective/kl"], index)
        self.write_samples(index, questions, samples, scores, rollout)
        metrics |= phases.metrics
        metrics["episode"] = float((index + 1) * self.config.responses)
        metrics["eps"] = self.config.responses / (time.monotonic() - started)
        return metrics, spent

    def text_metrics(self, questions: Sequence[Question], samples: Samples) -> dict[str, float]:
        """What is read off the responses themselves; on several processes, off this process's."""
        rows = samples.rows()
        metrics = {"samples/distinct_2": distinct_ngrams(rows)}
        if self.gold is not None:
            texts = [self.renderer.decode(row) for row in rows]
            scores = self.gold([one.messages[-1]["content"] for one in questions], texts)
            metrics["samples/gold"] = sum(scores) / len(scores)
        return metrics

    def starts_at_reference(self) -> bool:
        """Whether the reference is the very model that the policy starts from."""
        return self.context.input("policy").fingerprint == self.context.input("reference").fingerprint

    def batch(self, index: int) -> list[Question]:
        """This process's prompts of rollout `index`, each as often as it is to be answered. Prompts are visited in a
        fresh order on every pass."""
        picked = visited(
            len(self.questions),
            self.config.rollout.prompts,
            index,
            lambda number: self.context.seed(f"prompts {number}"),
        )
        mine = picked[self.accelerator.process_index :: self.accelerator.num_processes]
        return [self.questions[one] for one in mine for _ in range(self.config.rollout.responses_per_prompt)]

    def sample(self, questions: Sequence[Question], name: str) -> Samples:
        """One response per question; every process draws its own."""
        samples = self.engine.generate([one.ids for one in questions], self.sampling(name))
        self.engine.rest()  # what follows has the GPU to itself
        return samples

    def sampling(self, name: str) -> Sampling:
        """How responses are sampled; the seed is that of `name` and this process."""
        rollout = self.config.rollout
        return Sampling(
            rollout.max_response_tokens,
            rollout.temperature,
            self.renderer.stop_ids,
            self.renderer.pad_id,
            self.context.seed(f"{name}, process {self.accelerator.process_index}"),
        )

    def sample_sequences(self, count: int) -> list[list[int]]:
        """Whole sequences of the trained policy, prompt and response, as probes for the hand-over check."""
        questions = self.questions[:count]
        samples = self.sample(questions, "probes")
        return [one.ids + response for one, response in zip(questions, samples.rows(), strict=True)]

    def report(self, done: int, metrics: dict[str, float], bar: StageProgress) -> None:
        """metrics.jsonl, trackers, progress bar and alarms."""
        raised, self.history = alarms.check(metrics, self.history, self.facts)
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
        scores: Scores,
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
                reward=float(scores.total[row]),
                score=float(rollout.scores[row]),
                kl=float(kl[row]),
            )
