"""What is told of each rollout: metrics, alarms, the progress bar, and a few of its responses."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape

from align.context import Context
from align.data.render import Renderer
from align.errors import NumericError
from align.evaluation.policy import GoldScorer
from align.training.masked import Processes, moments
from align.training.progress import StageProgress
from stages.ppo import alarms
from stages.ppo.config import Config
from stages.ppo.inflight import Batch
from stages.ppo.metrics import distinct_ngrams
from stages.ppo.rollout import Rollout
from stages.ppo.scorer import Scores

SAMPLES_SHOWN = 4

SHOWN = {
    "reward": "objective/scores",
    "kl": "objective/kl",
    "length": "val/response_length",
    "eos": "val/eos_rate",
}
"""Metrics in the progress bar, by their names there."""


class Reporter:
    """Writes metrics.jsonl, samples.jsonl and what trackers are told. `gold` is the known reward of the demo's world;
    `max_training_score` the highest that the reward model has ever seen."""

    def __init__(
        self,
        config: Config,
        context: Context,
        accelerator: Accelerator,
        renderer: Renderer,
        gold: GoldScorer | None,
        max_training_score: float | None,
    ):
        self.config, self.context, self.accelerator = config, context, accelerator
        self.renderer, self.gold = renderer, gold
        facts = {
            "max_response_tokens": config.rollout.max_response_tokens,
            "clip_value": config.clip.value,
            "max_training_score": max_training_score,
        }
        self.facts = {name: float(value) for name, value in facts.items() if value is not None}
        self.history = alarms.History()
        """What alarms remember of the rollouts so far; saved in checkpoints."""
        self.console = Console(stderr=True, quiet=not accelerator.is_main_process)

    def report(self, done: int, metrics: dict[str, float], bar: StageProgress) -> None:
        """metrics.jsonl, trackers, progress bar and alarms."""
        raised: list[alarms.Alarm] = []
        if "objective/kl" in metrics:  # not in a round that only sampled, which says nothing
            raised, self.history = alarms.check(metrics, self.history, self.facts)
        self.context.metrics.write(done, **metrics, alarms=[alarm.name for alarm in raised])
        self.accelerator.log(metrics, step=done)
        bar.show(done, **{shown: metrics[name] for shown, name in SHOWN.items() if name in metrics})
        for alarm in raised:
            if alarm.fatal:
                raise NumericError(f"{self.context.job.stage}, rollout {done}: {alarm.message}")
            self.console.print(f"  [yellow]{self.context.job.stage}, rollout {done}:[/] {escape(alarm.message)}")

    def write_samples(self, index: int, batch: Batch, scores: Scores, rollout: Rollout) -> None:
        """A few responses of this rollout to samples.jsonl, at fixed rollouts."""
        every = self.config.samples_every or math.ceil(self.config.rollouts / 10)
        if index % every or not self.accelerator.is_main_process:
            return
        questions, samples = batch.questions, batch.samples
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

    def text_metrics(self, batch: Batch, processes: Processes) -> dict[str, float]:
        """What is read off the responses themselves. `samples/distinct_2` is of this process's: how many n-grams are
        different does not add up."""
        rows = batch.samples.rows()
        metrics = {"samples/distinct_2": distinct_ngrams(rows)}
        if self.gold is not None:
            texts = [self.renderer.decode(row) for row in rows]
            scores = self.gold([one.messages[-1]["content"] for one in batch.questions], texts) if texts else []
            given = torch.tensor(scores, dtype=torch.float64)
            metrics["samples/gold"] = moments(given, reduce=processes.sum).mean
        return metrics
