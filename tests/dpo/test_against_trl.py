"""TRL's own losses on the same batch: equal where TRL computes what the papers say, different where it does not.

Where it does not (TRL 1.16): `sigmoid` does not look at label smoothing, `ipo` divides log-ratios by the tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from align.data.rows import Preference
from align.evaluation.likelihood import response_logprob_sums
from align.models.roles import causal_role
from align.training.rows import preference_row
from stages.dpo.config import Config
from stages.dpo.losses import LOSSES, Pairs
from stages.dpo.trainer import pair_losses
from tests.models.tiny import demo_texts, new_opened


class TokenisedTrainer(DPOTrainer):
    """TRL's trainer on rows that hold token ids, for which it has no path."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenisedTrainer, dict[str, torch.Tensor], Pairs]:
    """TRL's trainer with a policy that is not its reference, a batch of six pairs, and what our own code says of it."""
    policy, reference = new_opened(0), new_opened(1)
    texts = demo_texts(6, seed=4)
    rows = [
        preference_row(
            policy.renderer,
            Preference([{"role": "user", "content": prompt}], answer, "ugh , " + other, "rows.jsonl:1"),
        )
        for (prompt, answer), (_, other) in zip(texts, reversed(texts), strict=True)
    ]
    prompts, sides = [row["prompt_ids"] for row in rows], ("chosen_ids", "rejected_ids")
    sums = [
        response_logprob_sums(causal_role(model), prompts, [row[side] for row in rows], policy.renderer.pad_id)
        for model in (policy.model, reference.model)
        for side in sides
    ]
    lengths = [[len(row[side]) for row in rows] for side in sides]
    pairs = Pairs(*(torch.tensor(column) for column in (*sums[:2], *lengths, *sums[2:])))
    folder = str(tmp_path_factory.mktemp("trl"))
    arguments = DPOConfig(
        folder, max_length=None, bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False
    )
    trainer = TokenisedTrainer(
        model=policy.model,
        ref_model=reference.model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )
    return trainer, trainer.data_collator([dict(row) for row in rows]), pairs


NAMES = {"exo": "exo_pair", "sppo": "sppo_hard"}
"""Theirs, where another."""


def value_of(theirs, loss: str, **settings: float) -> float:
    """The loss that TRL's trainer computes for the batch."""
    trainer, batch, _ = theirs
    trainer.loss_types, trainer.loss_weights = [NAMES.get(loss, loss)], [1.0]
    trainer.beta, trainer.label_smoothing = settings["beta"], settings.get("label_smoothing", 0.0)
    with torch.no_grad():
        return float(trainer._compute_loss(trainer.model, batch, return_outputs=False))


SMOOTHED = {"beta": 0.1, "label_smoothing": 0.2}


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.0}),
        ("robust", SMOOTHED),
        ("hinge", {"beta": 0.1}),
        ("exo", SMOOTHED),
        ("apo_zero", {"beta": 0.1}),
        ("apo_down", {"beta": 0.1}),
        ("sppo", {"beta": 0.1}),
        ("aot", SMOOTHED),
        ("aot_unpaired", SMOOTHED),
    ],
)
def test_equal_where_trl_is_right(theirs, loss, settings):
    ours = float(LOSSES[loss](theirs[2], **settings).mean())
    assert ours == pytest.approx(value_of(theirs, loss, **settings), rel=1e-5)


def test_label_smoothing_changes_sigmoid_here_and_not_there(theirs):
    """TRL 1.16 gives the same loss whatever the label smoothing."""
    plain = {"beta": 0.1, "label_smoothing": 0.0}
    assert value_of(theirs, "sigmoid", **SMOOTHED) == value_of(theirs, "sigmoid", **plain)
    ours = [float(LOSSES["sigmoid"](theirs[2], **settings).mean()) for settings in (plain, SMOOTHED)]
    assert abs(ours[0] - ours[1]) > 0.01


def test_ipo_is_of_sums_here_and_of_means_there(theirs):
    """TRL's value is ours with every log-ratio divided by its tokens."""
    pairs = theirs[2]
    found = value_of(theirs, "ipo", beta=0.1)
    means = [ratio / count for ratio, count in zip(pairs.log_ratios, pairs[2:4], strict=True)]
    assert found == pytest.approx(float(((means[0] - means[1] - 5) ** 2).mean()), rel=1e-5)
    assert found != pytest.approx(float(LOSSES["ipo"](pairs, 0.1).mean()), rel=0.01)


def test_sft_is_a_mean_over_pairs_here_and_over_tokens_there(theirs):
    """TRL adds the mean over all tokens of the micro-batch, in which long answers weigh more than in RPO and ORPO."""
    pairs = theirs[2]
    found = value_of(theirs, "sft", beta=0.1)
    assert found == pytest.approx(float(-pairs.chosen.sum() / pairs.chosen_tokens.sum()), rel=1e-5)
    without = pair_losses(Config(sft_weight=0.0), pairs)
    added = pair_losses(Config(sft_weight=1.0), pairs) - without
    torch.testing.assert_close(added, -pairs.chosen / pairs.chosen_tokens)


def test_losses_without_a_reference(theirs):
    """CPO and SimPO against TRL's experimental CPO trainer, the odds ratio against its ORPO trainer: their formulas on
    our sums and means. (Their trainers take text only.)"""
    pairs = theirs[2]
    constants = {"beta": 2.0, "alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 1.0}
    device = SimpleNamespace(device="cpu")
    cpo = SimpleNamespace(**constants, loss_type="sigmoid", accelerator=device)
    simpo = SimpleNamespace(**constants, loss_type="simpo", accelerator=device)
    found = {
        "cpo": CPOTrainer.cpo_loss(cpo, pairs.chosen, pairs.rejected)[0],
        "simpo": CPOTrainer.cpo_loss(simpo, *pairs.means)[0],
        "orpo": -ORPOTrainer.odds_ratio_loss(cpo, *pairs.means)[0],
    }
    torch.testing.assert_close(LOSSES["cpo"](pairs, 2.0), found["cpo"])
    torch.testing.assert_close(LOSSES["simpo"](pairs, 2.0, 1.0), found["simpo"])
    torch.testing.assert_close(LOSSES["orpo"](pairs, 2.0), found["orpo"], rtol=1e-4, atol=1e-6)
