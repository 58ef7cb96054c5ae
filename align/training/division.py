"""A batch divided among processes and passes, so that the sum of their gradients is that of the whole batch.

The libraries would fill up the last batch of an epoch with rows from its start, and average means of unequal numbers of
rows. Here every process goes through the very batches that one process would, and collates its own rows of each; a loss
that is a mean over rows is weighted by how many they are. A loss over tokens is divided by those of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

ROWS = "rows_of_process_and_all"
"""Key under which a collated batch says how many rows it has, and how many all processes have together."""


@dataclass(frozen=True)
class OwnRows:
    """Collates those of a batch's rows that belong to one process."""

    collate: Callable[[list[Any]], dict[str, Any]]
    process: int
    processes: int

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """With no row left for this process, one that counts for nothing: all processes have to take part."""
        own = rows[self.process :: self.processes]
        batch = self.collate(own or rows[:1])
        if not own and "labels" in batch:
            batch["labels"].fill_(-100)
        return {**batch, ROWS: (len(own), len(rows))}


class DividedTrainer(Trainer):
    """Mixin before a trainer class whose `data_collator` is an OwnRows."""

    _step_rows: int
    """Rows of the current step, over all processes."""
    own_rows: int
    """Rows of the current micro-batch that are this process's; with none of them one that counts for nothing."""

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, **options: Any) -> DataLoader:
        processes = self.accelerator.num_processes
        loader = super()._get_dataloader(dataset, description, batch_size * processes, **options)
        if processes > 1:
            shard: Any = loader.batch_sampler
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of one step."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_rows = sum(batch[ROWS][1] for batch in batches)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch. A mean over its rows gets the weight that it has in the mean over the step's rows, times
        what the trainer divides by: batches in the step, and processes."""
        own, together = inputs.pop(ROWS)
        self.own_rows = own
        with self._gathering(own, together):
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weight = own * self.accelerator.num_processes * self.current_gradient_accumulation_steps / self._step_rows
        if num_items_in_batch is not None or weight == 1:
            return found
        return (found[0] * weight, *found[1:]) if return_outputs else found * weight

    @contextmanager
    def _gathering(self, own: int, together: int) -> Iterator[None]:
        """Inside, metrics are gathered from processes that have unequal numbers of rows, which the library cannot."""
        accelerator: Any = self.accelerator
        processes = accelerator.num_processes
        if together % processes == 0:
            yield
            return
        plain, most = accelerator.gather, -(-together // processes)

        def gather(tensor: Any) -> torch.Tensor:
            if tensor.ndim == 0:
                return plain(tensor)
            values = len(tensor) // max(own, 1)  # of a row: two where chosen and rejected are stacked
            padded = tensor.new_zeros(values * most, *tensor.shape[1:])
            padded[: values * own] = tensor[: values * own]
            parts = plain(padded).split(values * most)
            return torch.cat([part[: values * len(range(n, together, processes))] for n, part in enumerate(parts)])

        accelerator.gather = gather
        try:
            yield
        finally:
            del accelerator.gather
