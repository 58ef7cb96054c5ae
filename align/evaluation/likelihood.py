"""Log-likelihoods of given texts, each sum divided once by the tokens it is over: never a mean of batch means."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from align.generation.engine import left_pad
from align.models.roles import Role
from align.training.logprobs import response_states, state_logprobs
from align.training.masked import length_mask

BATCH = 64


def response_logprob_sums(
    role: Role,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int = BATCH,
) -> list[float]:
    """log p(response | prompt) of each row, in nats: the sum over all response tokens, the stop token included."""
    values: list[float] = []
    with role.evaluating():
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            prompt_ids, prompt_mask = left_pad(prompts[rows], pad_id, role.device)
            response_ids, valid = right_pad(responses[rows], pad_id, role.device)
            ids = torch.cat([prompt_ids, response_ids], 1)
            mask = torch.cat([prompt_mask, valid.long()], 1)
            states = response_states(role, ids, mask, response_ids.shape[1])
            logprobs, _ = state_logprobs(role, states[:, :-1], response_ids, valid, temperature=1.0)
            values += logprobs.sum(1).tolist()
    return values


def token_loss(role: Role, rows: Sequence[dict[str, list[int]]], pad_id: int) -> float:
    """Mean negative log-likelihood per trained token (label not -100) over all rows, in nats."""
    total, count = 0.0, 0
    with role.evaluating():
        for start in range(0, len(rows), BATCH):
            batch = list(rows[start : start + BATCH])
            ids, valid = right_pad([row["input_ids"] for row in batch], pad_id, role.device)
            labels, _ = right_pad([row["labels"] for row in batch], -100, role.device)
            trained = labels[:, 1:] != -100
            states = response_states(role, ids, valid.long(), ids.shape[1] - 1)
            logprobs, _ = state_logprobs(role, states[:, :-1], ids[:, 1:], trained, temperature=1.0)
            total -= float(logprobs.sum())
            count += int(trained.sum())
    return total / count


def right_pad(
    rows: Sequence[Sequence[int]], fill: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, T) filled on the right, and the bool mask (B, T) of what is a row's own."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), fill)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(list(row))
    return ids.to(device), length_mask(lengths, ids.shape[1]).to(device)
