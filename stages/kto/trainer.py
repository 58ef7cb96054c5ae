"""KTO: the loss of stages/kto/losses.py on the trainer of whole responses."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from datasets import Dataset as Table
from datasets import concatenate_datasets
from torch import Tensor

from align.evaluation.likelihood import response_logprob_sums
from align.models.roles import Role
from align.training.prepared import BATCH, write_table
from align.training.responses import ResponseTrainer, Scored
from align.training.rows import TokenRow
from stages.kto.losses import kl_estimate, kto, mismatches


class Weighing(NamedTuple):
    """The constants of the loss."""

    beta: float
    good_weight: float
    bad_weight: float


class JudgementTrainer(ResponseTrainer):
    """Rows have `prompt_ids`, `response_ids`, `is_good`, and `mismatched_ids`: the answer to another prompt, on which
    the KL is estimated; empty where there is none."""

    responses = ("response_ids", "mismatched_ids")
    trains_second = False

    def __init__(self, weighing: Weighing, *arguments: Any):
        """`arguments` as those of every ResponseTrainer."""
        super().__init__(*arguments)
        self.weighing = weighing

    def row_losses(self, scored: Scored, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each answer, and its metrics."""
        assert scored.reference is not None
        log_ratios, mismatched = scored.policy - scored.reference
        mismatched = mismatched.detach().where(scored.tokens[1] > 0, float("nan"))
        kl = kl_estimate(self.accelerator.gather(mismatched))
        is_good = batch["is_good"]
        for name, where in (("good", is_good), ("bad", ~is_good)):
            self.note(f"rewards/{name}", self.weighing.beta * log_ratios, where)
            self.note(f"logps/{name}", scored.policy[0], where)
            self.note(f"log_ratios/{name}", log_ratios, where)
        self.note("kl", kl.expand(len(is_good)))
        return kto(log_ratios, is_good, kl, *self.weighing)


def with_mismatches(rows: Table, max_length: int, seed: int) -> Table:
    """The rows with `mismatched_ids`: empty where no other prompt has an answer, and where it would be too long. On
    disk until the process ends, as the rows are."""
    partners = mismatches(array("q", (hash(tuple(ids)) for ids in rows["prompt_ids"])), seed)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mismatched.arrow"
        write_table(path, ({"mismatched_ids": ids} for ids in _mismatched(rows, partners, max_length)))
        return concatenate_datasets([rows, Table.from_file(str(path))], axis=1)  # stays open, so it can be read


def _mismatched(rows: Table, partners: Sequence[int | None], max_length: int) -> Iterator[list[int]]:
    answers = rows.select_columns("response_ids")
    for start in range(0, len(rows), BATCH):
        chosen = partners[start : start + BATCH]
        found = iter(answers[[partner for partner in chosen if partner is not None]]["response_ids"])
        for asked, partner in zip(rows[start : start + BATCH]["prompt_ids"], chosen, strict=True):
            answer = [] if partner is None else next(found)
            yield answer if len(asked) + len(answer) <= max_length else []


def held_out_metrics(policy: Role, reference: Role, rows: Sequence[TokenRow], pad_id: int) -> dict[str, Any]:
    """How well log pi - log ref tells held-out good answers from bad ones, and how much likelier than at the start a
    token of either kind is, in nats.

    `auc`: the share of all pairs of a good and a bad answer in which the good one gained more, ties counting half.
    """
    prompts, answers = [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows]
    ours, theirs = (response_logprob_sums(role, prompts, answers, pad_id) for role in (policy, reference))
    log_ratios = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    is_good = torch.tensor([row["is_good"] for row in rows])
    tokens = torch.tensor([len(answer) for answer in answers])
    metrics: dict[str, Any] = {"good": int(is_good.sum()), "bad": int((~is_good).sum())}
    if metrics["good"] and metrics["bad"]:
        metrics["auc"] = auc(log_ratios[is_good], log_ratios[~is_good])
    for name, where in (("good", is_good), ("bad", ~is_good)):
        if metrics[name]:
            metrics[f"{name}_log_ratio"] = float(log_ratios[where].sum() / tokens[where].sum())
    return metrics


def auc(good: Tensor, bad: Tensor) -> float:
    """P(good > bad) + P(good = bad) / 2 over all pairs: good (G,), bad (B,), in G log B."""
    ranked = bad.sort().values
    below, up_to = (torch.searchsorted(ranked, good, right=right).sum() for right in (False, True))
    return float(below + up_to) / (2 * len(good) * len(bad))
