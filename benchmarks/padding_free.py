"""What padding costs a stage on TRL, and its passes without padding do not: `python benchmarks/padding_free.py`.

Forward and backward passes of sft's loss over batches of rows of very unequal lengths, padded and not, in turns
(A B A B ...). Time is this process's own processor time on one thread: other work on the machine does not count.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from align.models.packed import leave_out_padding

ROWS, SHORTEST, LONGEST, TURNS = 8, 16, 384, 5
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "vocab_size": 1024,
}


def batch() -> dict[str, torch.Tensor]:
    """Rows whose lengths are spread evenly in their logarithm, as those of conversations nearly are."""
    lengths = torch.logspace(0, 1, ROWS, base=LONGEST / SHORTEST).mul(SHORTEST).long()
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    ids = torch.randint(5, SIZES["vocab_size"], mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def new_model() -> LlamaForCausalLM:
    """The same weights every time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    add_fused_lm_head(model)
    return model


def seconds(model: LlamaForCausalLM, rows: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Of one pass and its gradients; and its loss."""
    model.zero_grad()
    started = time.process_time()
    loss = model(**rows, fused_lm_head=True).loss
    loss.backward()
    return time.process_time() - started, float(loss.detach())


def main() -> None:
    """Prints the ratio of the medians, and how far apart the losses are."""
    torch.set_num_threads(1)
    rows, padded, packed = batch(), new_model(), new_model()
    assert leave_out_padding(packed.model)
    for model in (padded, packed):
        seconds(model, rows)  # the first pass is slower
    turns = [(seconds(padded, rows), seconds(packed, rows)) for _ in range(TURNS)]
    before, after = (statistics.median(turn[side][0] for turn in turns) for side in (0, 1))
    gap = abs(turns[0][0][1] - turns[0][1][1])
    share = float(rows["attention_mask"].float().mean())
    print(f"{share:.0%} of the places are tokens; {before:.2f} s padded, {after:.2f} s without: {before / after:.2f} x")
    print(f"losses differ by {gap:.1g}")


if __name__ == "__main__":
    main()
