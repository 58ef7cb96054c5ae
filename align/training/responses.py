"""The trainer of stages that learn from the likelihood of whole responses, `dpo` and `kto`.

It stands on TRL's DPOTrainer, which holds policy and reference under any launcher and computes log-probabilities
without the logits of a whole batch. Batches, losses and the reference's cache are our own: docs/dpo.md says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import pad, use_adapter

from align.context import Context
from align.models.lora import without_wrapper
from align.models.opened import open_policy
from align.models.partitioned import layer_by_layer, parts_hash, whole
from align.models.roles import Role, causal_role
from align.recipe.training_settings import TrainingSettings
from align.training.division import ROWS
from align.training.passes import prepare_passes
from align.training.reference import FOLDER, read_logprobs, reference_key, write_logprobs
from align.training.trainer import CommittedTrainer

PROMPT = "prompt_ids"
REFERENCE = "reference_logprobs"
"""The column of the reference's log-probabilities: two numbers for each row."""
DISPLACED = -0.5
"""Nats per token that good answers may lose before a person is told."""


@dataclass(frozen=True)
class ResponseCollator:
    """B rows, each with a prompt and two responses to it -> 2B sequences: the first response of every row, then the
    second of every row."""

    responses: tuple[str, str]
    """Names of the columns."""
    pad_id: int
    multiple: Any
    """Sequences are padded to a multiple of it, if there is one."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask, response_mask (2B,L), and what else the rows have (B,...)."""
        pairs = [(row[PROMPT], row[name]) for name in self.responses for row in rows]
        columns = {
            "input_ids": ([[*prompt, *response] for prompt, response in pairs], self.pad_id),
            "attention_mask": ([[1] * (len(prompt) + len(response)) for prompt, response in pairs], 0),
            "response_mask": ([[0] * len(prompt) + [1] * len(response) for prompt, response in pairs], 0),
        }
        others = {name for name in rows[0] if name not in (PROMPT, *self.responses)}
        return {
            name: pad([torch.tensor(line) for line in lines], fill, pad_to_multiple_of=self.multiple)
            for name, (lines, fill) in columns.items()
        } | {name: torch.tensor([row[name] for row in rows]) for name in sorted(others)}


class Scored(NamedTuple):
    """What the loss of a batch is made of, each (2,B): first and second responses."""

    policy: Tensor
    """log pi, summed over the tokens of the response."""
    tokens: Tensor
    """How many they are."""
    reference: Tensor | None
    """The same under the reference; None where there is none."""


@dataclass(frozen=True)
class Reference:
    """The policy that a stage starts from, frozen, and where its log-probabilities come from."""

    model: Any = None
    """A second model in memory. None: the policy with its adapter off, or one of the following."""
    cache: Path | None = None
    """Folder of what is computed before the training, with the policy as it is then."""
    is_needed: bool = True


def open_reference(context: Context, config: TrainingSettings, template: str, *, precompute: bool) -> Reference:
    """The reference of a stage; loads the policy a second time if that is needed."""
    if precompute:
        return Reference(cache=context.directory.parents[1] / FOLDER)
    if config.lora:
        return Reference()
    model = open_policy(context.input("policy"), template).model
    prepare_passes(model, config)
    return Reference(model)


def reference_role(reference: Reference, context: Context, template: str, policy: Any) -> Role:
    """The reference after the training, to be measured against: loaded now if it was not in memory before."""
    if is_peft_model(policy):
        return replace(causal_role(policy), switch=policy.disable_adapter)
    return causal_role(reference.model or open_policy(context.input("policy"), template).model)


def warn_of_displacement(stage: str, answers: str, log_ratio: float | None) -> None:
    """Tells a person when the answers that were to be learnt became much less likely (Razin et al. 2024). `log_ratio`
    is log pi - log ref of a token of held-out ones."""
    if log_ratio is not None and log_ratio < DISPLACED:
        Console(stderr=True).print(
            f"  [yellow]{stage}:[/] {answers} answers became less likely too, by {-log_ratio:.2f} nats per token: "
            "their likelihood went to answers that nobody judged; a larger beta or fewer steps move less of it",
            highlight=False,
        )


class ResponseLoss(DPOTrainer):
    """What TRL's trainer does otherwise; see ResponseTrainer."""

    loss_is_scaled_for_ga = True
    """To the libraries: a loss is divided by the rows of the whole step, and by nothing else."""
    responses: tuple[str, str]
    """Columns of the two responses."""
    trains_second = True
    """Whether gradients go through the second responses."""
    own_rows: int
    """Rows of the micro-batch that are this process's (align.training.division)."""
    accelerator: Any  # what it gathers is a tensor here, and typed as anything in a container
    model: Any

    def __init__(
        self,
        model: Any,
        reference: Reference,
        arguments: Mapping[str, Any],
        rows: Dataset,
        tokenizer: Any,
    ):
        """`arguments` of DPOConfig. Computes the reference's log-probabilities if they are to be cached."""
        self.reference = reference
        args = DPOConfig(
            **arguments,
            max_length=None,
            remove_unused_columns=False,
            # To TRL this means: load no reference. What is computed instead is ours, `_precompute_ref_logps`.
            precompute_ref_log_probs=reference.cache is not None or not reference.is_needed,
        )
        super().__init__(
            model=model,
            ref_model=reference.model,
            args=args,
            data_collator=ResponseCollator(self.responses, tokenizer.pad_token_id, args.pad_to_multiple_of),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        if is_peft_model(model):
            # TRL made a frozen copy of the adapter for the reference, and with two adapters a resumed run silently
            # loses the trained one. The adapter switched off is exact, because it was fresh (B = 0).
            model.delete_adapter("ref")

    def row_losses(self, scored: Scored, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each row (B,)."""
        raise NotImplementedError

    def note(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Adds a number of each row (B,), or of the rows `where`, to a metric: metrics.jsonl has means over rows."""
        values = self.accelerator.gather(values.detach().float())
        if where is not None:
            values = values[self.accelerator.gather(where)]
        if len(values):
            self._metrics["train"][name].extend(values.tolist())

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The micro-batch's share of the step's loss: the sum over its rows divided by the rows of the step."""
        assert num_items_in_batch is not None and not return_outputs
        both = len(inputs["input_ids"])
        trained = both if self.trains_second else both // 2
        outputs = self._forward(model, inputs, slice(0, trained))
        policy = outputs.log_probs.sum(1)
        if trained < both:
            with torch.no_grad():
                second = self._forward(model, inputs, slice(trained, both)).log_probs.sum(1)
            policy = torch.cat([policy, second])
        tokens = inputs["response_mask"].sum(1)
        scored = Scored(policy.view(2, -1), tokens.view(2, -1), self._reference_of(inputs))
        # The mean gradient of all processes is taken, of which each has its own share of the rows.
        losses = self.row_losses(scored, inputs)[: self.own_rows]
        loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        self.note("entropy", outputs.entropy.sum(1) / tokens[:trained])
        tokens_seen = int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        self._total_train_tokens += tokens_seen // (self._tp_size or 1)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Rows of an optimiser step, over its micro-batches and all processes."""
        return torch.tensor(sum(batch[ROWS][1] for batch in batch_samples), device=device)

    def _forward(self, model: Any, batch: Mapping[str, Tensor], rows: slice) -> Any:
        """TRL's output for some sequences: log_probs and entropy (rows,L-1), 0 outside the responses."""
        ids, mask = batch["input_ids"][rows], batch["response_mask"][rows]
        extra = {"output_router_logits": True} if self.aux_loss_enabled and torch.is_grad_enabled() else {}
        return model(
            input_ids=ids,
            attention_mask=batch["attention_mask"][rows],
            labels=ids.masked_fill(mask == 0, -100),
            fused_lm_head=True,
            **extra,
        )

    def _reference_of(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """(2,B), from the cache or computed now."""
        if not self.reference.is_needed:
            return None
        if REFERENCE in batch:
            return batch[REFERENCE].T
        return self._compute_reference(batch)

    @torch.no_grad()
    def _compute_reference(self, batch: Mapping[str, Tensor]) -> Tensor:
        """log ref of both responses, summed over their tokens: (2,B)."""
        is_adapter = is_peft_model(self.model)
        off = use_adapter(self.accelerator.unwrap_model(self.model), None) if is_adapter else nullcontext()
        with off, self.accelerator.autocast():
            outputs = self._forward(self.ref_model or self.model, batch, slice(None))
        return outputs.log_probs.sum(1).view(2, -1)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """Nothing to prepare: TRL would render and tokenise text, and rows hold token ids."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Called by TRL before the training: adds the reference's log-probabilities as a column, from the cache if they
        are there. The policy is still what it starts from, so it is the reference."""
        if self.reference.cache is None:
            return dataset
        key = reference_key(
            f"{self._precompute_model_hash}, {parts_hash(self.model)}",
            without_wrapper(self.model).config,
            dataset,
            (PROMPT, *self.responses),
            f"{self.model.dtype}, {self.accelerator.mixed_precision}, {self.accelerator.device.type}",
        )
        path = self.reference.cache / f"{key}.safetensors"
        known = [read_logprobs(path)]
        broadcast_object_list(known)  # the processes must agree on whether to compute
        values = self._compute_all(dataset, batch_size) if known[0] is None else known[0]
        if known[0] is None and self.accelerator.is_main_process:
            write_logprobs(path, values)
        return dataset.add_column(REFERENCE, values.tolist())

    def _compute_all(self, dataset: Dataset, batch_size: int) -> Tensor:
        """(N,2) for all rows, in order."""
        batches: Any = self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self.data_collator))  # type: ignore[arg-type]
        head = without_wrapper(self.model).get_output_embeddings()  # read by TRL without calling it
        with layer_by_layer(self.model), whole(head.parameters()):
            parts = [self.accelerator.gather_for_metrics(self._compute_reference(batch).T) for batch in batches]
        return torch.cat(parts).cpu()


class ResponseTrainer(CommittedTrainer, ResponseLoss):
    """Trains on `row_losses`, which a stage defines. Rows have `prompt_ids` and two responses."""
