"""The loop of PPO: sync -> sample -> score -> reference and values -> advantages -> epochs of minibatches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from accelerate import Accelerator

from align import ranks
from align.context import Context
from align.data.render import Renderer
from align.errors import ConfigError, Interrupted, RolloutError
from align.evaluation.policy import GoldScorer
from align.generation.engine import RolloutEngine, Samples, Sampling
from align.training.masked import largest
from align.training.optimisers import check_replicas
from align.training.parity import NUM_PROBES, ParityGuard
from align.training.progress import StageProgress
from align.training.sharding import layout
from stages.ppo import alarms
from stages.ppo.checkpoint import load_checkpoint, save_checkpoint
from stages.ppo.config import Config
from stages.ppo.correction import correction_metrics, importance_weights
from stages.ppo.inflight import Batch, Flight
from stages.ppo.metrics import (
    Phases,
    flight_metrics,
    mismatch,
    rollout_metrics,
    staleness_metrics,
)
from stages.ppo.packing import stretch
from stages.ppo.report import Reporter
from stages.ppo.rollout import Question, Rollout, join
from stages.ppo.scorer import Rewarder, Scores
from stages.ppo.trainer import PPOTrainer


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
        self.reporter = Reporter(config, context, accelerator, renderer, gold, max_training_score)
        self.flight = self.new_flight() if config.rollout.round_tokens or config.rollout.overlap else None

    def run(self) -> int:
        """All rollouts, from the newest checkpoint that verifies. Returns their number: fewer than the recipe's when
        the KL budget is spent. Raises Interrupted after a signal."""
        config, context = self.config, self.context
        start, self.reporter.history = load_checkpoint(context, self.trainer, self.flight, layout(self.accelerator))
        check_replicas(self.trainer.models)
        context.metrics.truncate_after(start)
        context.samples.truncate_after(start)
        checkpoint_every = config.checkpoint.every_steps or math.ceil(config.rollouts / 10)
        self.reporter.console.print(f"  rollouts: {self.engine.name}, {self.engine.summary}", highlight=False)
        self.accelerator.init_trackers(context.job.stage, config=None)
        done = start
        with StageProgress(
            context.job.stage, config.rollouts, "rollouts", enabled=self.accelerator.is_main_process
        ) as bar:
            for index in range(start, config.rollouts):
                metrics, spent = self.rollout(index)
                done = index + 1
                self.reporter.report(done, metrics, bar)
                if spent:
                    self.budget_spent(done, metrics["objective/kl"])
                    break
                stops = ranks.any_of(context.stop.is_set)  # all processes stop after the same rollout
                if done % checkpoint_every == 0 or stops:
                    self.save(done)
                if stops and done < config.rollouts:
                    context.stop_here(done)
        self.save(done)  # the policy is still to be measured, which may fail
        return done

    @cached_property
    def guard(self) -> ParityGuard:
        """Compares the engine with the policy."""
        probes = [question.ids for question in self.questions[:NUM_PROBES]]
        trainer = self.trainer
        return ParityGuard(
            self.engine, trainer.actor, probes, self.sampling("parity"), trainer.precision, trainer.passes.autocast
        )

    def sync(self) -> None:
        """The engine samples from the policy as it is now. Raises RolloutError, in all processes, when it does not."""
        with ranks.failing_together(RolloutError):
            self.engine.sync()
        self.guard.check()

    def settle(self) -> None:
        """Waits for what is sampled ahead. Raises RolloutError, in all processes, when that went wrong."""
        if self.flight is not None:
            with ranks.failing_together(RolloutError):
                self.flight.settle()

    def budget_spent(self, done: int, kl: float) -> None:
        """Says that the stage ends here. Raises ConfigError when nothing was learned yet."""
        stage, budget = self.context.job.stage, self.config.kl.budget
        if self.trainer.num_steps == 0:
            raise ConfigError(
                f"{stage}: the policy starts at a KL of {kl:.3g} to the reference, above kl.budget {budget:g}; raise it"
            )
        self.reporter.console.print(
            f"  {stage}, rollout {done}: KL {kl:.3g} is above kl.budget {budget:g}: done", highlight=False
        )

    def save(self, done: int) -> None:
        """A checkpoint after `done` rollouts, with what is sampled ahead. Raises RolloutError, after a checkpoint
        without it, when that went wrong."""
        try:
            self.settle()
        except RolloutError:
            self._save(done)
            raise
        self._save(done)

    def _save(self, done: int) -> None:
        keep, history = self.config.checkpoint.keep, self.reporter.history
        save_checkpoint(self.context, self.trainer, self.flight, history, done, keep, layout(self.accelerator))

    def rollout(self, index: int) -> tuple[dict[str, float], bool]:
        """One round: sync, sample, score, observe, improve. Returns its metrics, and whether the KL budget is spent:
        then the round is not learned from."""
        started, phases = time.monotonic(), Phases()
        try:
            batch = self.collect(index, phases)
            with phases.phase("time/score"):
                scores = self.score(batch)
        except (Interrupted, RolloutError):  # an engine or an endpoint is down: what was learned before is kept
            if self.flight is not None:
                self.flight.give_up()
            if index > 0:
                self.save(index)
            raise
        sizes = torch.tensor([len(batch.questions), batch.episodes], dtype=torch.float64)
        responses, episodes = self.trainer.processes.sum(sizes).tolist()
        metrics, spent = self.learn(index, batch, scores, phases) if responses else ({}, False)
        if responses and not spent:
            self.trainer.adapt(metrics["objective/kl"], index, int(responses))
        metrics |= flight_metrics(batch.counts, batch.grown, self.trainer.processes) | phases.metrics
        metrics["episode"] = episodes
        metrics["eps"] = responses / (time.monotonic() - started)
        return metrics, spent

    def collect(self, index: int, phases: Phases) -> Batch:
        """Hands the policy over and samples. With `flight`, what is sampled may end in a later round. Raises
        RolloutError, in all processes, when an engine gives up."""
        self.settle()
        with phases.phase("time/sync"):
            self.sync()
        with ranks.failing_together(RolloutError):
            if self.flight is not None:
                return self.flight.collect(index, phases)
            questions = self.batch(index)
            with phases.phase("time/rollout"):
                samples = self.sample(questions, f"rollout {index}")
            return Batch(questions, samples, (index + 1) * len(questions))

    def score(self, batch: Batch) -> Scores:
        """The reward. Raises Interrupted and RolloutError in all processes."""
        questions = batch.questions
        return self.rewarder([one.messages for one in questions], [one.ids for one in questions], batch.samples)

    def learn(self, index: int, batch: Batch, scores: Scores, phases: Phases) -> tuple[dict[str, float], bool]:
        """Observe and improve: see `rollout`."""
        device, processes = self.accelerator.device, self.trainer.processes
        responses = join([one.ids for one in batch.questions], batch.samples, self.renderer.pad_id, device)
        with phases.phase("time/observe"):
            rollout = self.trainer.observe(responses, scores.tokens.to(device))
        if self.trainer.num_steps == 0 and self.starts_at_reference():
            difference = largest((rollout.logp_old - rollout.logp_ref).abs(), processes)
            alarms.check_starts_at_reference(difference, self.trainer.rounding)
        rollout, corrected = self.correct(index, batch, rollout)
        metrics = rollout_metrics(rollout, self.trainer.kl_coef, scores, processes)
        metrics |= self.reporter.text_metrics(batch, processes) | corrected
        budget = self.config.kl.budget
        spent = budget is not None and metrics["objective/kl"] > budget
        if not spent:
            with phases.phase("time/learn"):
                metrics |= self.trainer.improve(rollout, index)
        self.reporter.write_samples(index, batch, scores, rollout)
        return metrics, spent

    def correct(self, index: int, batch: Batch, rollout: Rollout) -> tuple[Rollout, dict[str, float]]:
        """The rollout with each token weighted as if the policy at hand had sampled it, and what that took."""
        behaviour = batch.samples.logprobs
        if behaviour is None:
            return rollout, {}
        processes, settings, mask = self.trainer.processes, self.config.rollout, rollout.responses.mask
        weights = importance_weights(behaviour, rollout, settings.correction, settings.correction_cap)
        corrected = replace(rollout, advantages=rollout.advantages * weights)
        metrics = correction_metrics(weights, rollout, processes)
        if batch.versions is None:
            return corrected, mismatch(behaviour, rollout, mask, processes) | metrics
        versions = batch.versions.to(mask.device)
        metrics |= staleness_metrics(versions, index, mask, processes)
        comparable = mask & (versions == index)
        if largest(comparable.double(), processes) > 0:
            metrics |= mismatch(behaviour, rollout, comparable, processes)
        return replace(corrected, weights=weights), metrics

    def starts_at_reference(self) -> bool:
        """Whether the reference is the very model that the policy starts from."""
        return self.context.input("policy").fingerprint == self.context.input("reference").fingerprint

    def batch(self, index: int) -> list[Question]:
        """This process's prompts of rollout `index`, each as often as it is to be answered. Prompts are visited in a
        fresh order on every pass."""
        rollout = self.config.rollout
        mine = self.visited(index * rollout.prompts, (index + 1) * rollout.prompts)
        return [self.questions[one] for one in mine for _ in range(rollout.responses_per_prompt)]

    def visited(self, first: int, last: int) -> list[int]:
        """This process's share of the questions, by number, at these places of the stream of prompts."""
        picked = stretch(len(self.questions), first, last, lambda number: self.context.seed(f"prompts {number}"))
        return picked[self.accelerator.process_index :: self.accelerator.num_processes]

    def new_flight(self) -> Flight:
        """What keeps responses from round to round."""
        config, processes = self.config, self.accelerator.num_processes
        return Flight(
            config,
            self.questions,
            capacity=config.responses // processes,
            pad_id=self.renderer.pad_id,
            stream=lambda first, last: self.visited(first * processes, last * processes),
            generate=lambda prompts, tokens, name: self.engine.generate(
                prompts, replace(self.sampling(name), max_tokens=tokens)
            ),
            rest=self.engine.rest,
        )

    def sample(self, questions: Sequence[Question], name: str) -> Samples:
        """One response per question; every process draws its own."""
        samples = self.engine.generate([one.ids for one in questions], self.sampling(name))
        self.engine.rest()  # the GPU is left to what follows
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
