"""Demonstrations mixed into PPO's optimiser steps (Ouyang et al. 2022, PPO-ptx).

The loss is -sum(logp) over the response tokens of a batch, computed by the trainer with the log-probabilities it has
for PPO, and divided once by their number: the mean negative log-likelihood per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from align.generation.engine import Samples
from stages.ppo.packing import visited
from stages.ppo.rollout import Responses, join


class Demonstrations:
    """Rows of (prompt ids, response ids), the response with its stop token, in batches of `batch_size` over all
    processes, of which this is number `process` of `num_processes`.

    A batch follows from the seed and the step: no generator state has to be kept.
    """

    def __init__(
        self,
        rows: Sequence[tuple[list[int], list[int]]],
        batch_size: int,
        seed: int,
        pad_id: int,
        device: torch.device | str = "cpu",
        process: int = 0,
        num_processes: int = 1,
    ):
        self.rows, self.batch_size, self.seed, self.pad_id, self.device = rows, batch_size, seed, pad_id, device
        self.process, self.num_processes = process, num_processes

    def batch(self, step: int) -> Responses:
        """This process's rows of optimiser step number `step` (from 0), as if they had been sampled."""
        picked = visited(len(self.rows), self.batch_size, step, lambda number: self.seed + 100_003 * number)
        mine = [self.rows[one] for one in picked[self.process :: self.num_processes]]
        responses = [torch.tensor(response) for _, response in mine]
        samples = Samples(
            pad_sequence(responses, batch_first=True, padding_value=self.pad_id),
            torch.tensor([len(response) for response in responses]),
            torch.ones(len(responses), dtype=torch.bool),
        )
        return join([prompt for prompt, _ in mine], samples, self.pad_id, self.device)
