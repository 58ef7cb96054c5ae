"""Memory of one forward and backward pass, in numbers per token. Derived as in Korthikanti et al. 2022 (section 4.1) by
going through a block and noting what autograd keeps, for the code that runs here: RMSNorm or LayerNorm, attention that
never holds its (T,T) scores (Dao et al. 2022), no dropout.

h hidden, q width of all queries, k of all keys, f of a feed-forward layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.pipeline.estimate.shapes import Shapes
from align.recipe.training_settings import LoraSettings

TILE_TOKENS, TILE_WORDS = 4096, 32768
"""Tokens and vocabulary of the logits that TRL's fused head computes at a time (trl.kernels.chunked_logprob)."""
TILE_COPIES = 9
"""Tiles alive at once in its backward pass in torch operations: logits twice, log-probabilities, probabilities, the
gradient, the one-hot targets, and three temporaries. With Triton there is one."""
MAX_TOKENS, CPU_BLOCK = 1024, 128
"""Tokens of which ppo's logits are kept, and are worked on at a time (align.training.logprobs)."""
BLOCK_COPIES = 4
"""Blocks alive at once in their backward pass: the gradients of the chosen logits and of the normaliser, their sum, and
the logits where they are computed once more."""

WHOLE_COPIES = 3
"""Of all logits in float32 in the backward pass of the library's own loss: log-probabilities, the gradient of those,
and that of the logits."""

MMAP_THRESHOLD = 32 * 2**20
"""Bytes from which on glibc gives a freed block back to the system, after it has met larger ones (mallopt(3))."""


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: rows of `width` tokens, padding included."""

    rows: int
    width: int
    packed: bool = False
    """Whether rows are laid end to end (align.models.packed)."""
    recomputes: str = "none"
    """What is computed again in the backward pass: none, selective or full (align.models.recomputation)."""

    @property
    def tokens(self) -> int:
        """Tokens of the pass."""
        return self.rows * self.width


@dataclass(frozen=True)
class Width:
    """Bytes of a number."""

    stream: int
    """Of the residual stream, and so of the norms: that of the weights."""
    compute: int
    """Of what linear layers and attention work on; under autocast less than `stream`."""


def per_token(shapes: Shapes, width: Width, lora: LoraSettings | None = None, *, packed: bool = False) -> float:
    """Bytes that autograd keeps of one token in all blocks.

    - A norm keeps its input and, if written out in Python with a weight that is trained, the normalised input.
    - A linear layer keeps its input if it is trained or has an adapter. q, k and v read the same one (h), gate and up
      too (h); the feed-forward's last layer reads f. An adapter also keeps `rank` numbers between A and B.
    - Attention keeps q, k, v, its output, and one number per head. In a padded batch k and v are repeated for all query
      heads; packed, the output is put into another order, so the layer after it keeps another q.
    - act(gate) * up keeps its three parts; a feed-forward without gate keeps the input of its activation.
    """
    blocks, f = shapes.layers, shapes.feed_forward
    norms = shapes.norms * (1 if shapes.native_norm or lora else 2) * width.stream
    attention = 3 * shapes.queries + 2 * shapes.keys if packed else 4 * shapes.queries
    inside = attention + shapes.heads + f * (3 if shapes.is_gated else shapes.activation_copies)
    inputs = 2 * shapes.hidden + f
    adapters = 0.0
    if lora:
        adapted = shapes.adapted(lora)
        inputs *= len(adapted) / len(shapes.linears)
        adapters = len(adapted) * lora.rank
    return norms + (blocks * (inside + inputs) + adapters) * width.compute


def kept(shapes: Shapes, one: Pass, width: Width, lora: LoraSettings | None = None) -> float:
    """Bytes that a forward pass leaves for the backward pass. Where activations are computed again, only the input of
    each block (h) is left, and what `selective` keeps; and one block is whole at a time."""
    whole = per_token(shapes, width, lora, packed=one.packed)
    if one.recomputes != "none":
        dear = results(shapes, lora) * width.compute if one.recomputes == "selective" else 0
        whole = shapes.layers * shapes.hidden * width.stream + dear + (whole - dear) / shapes.layers
    return one.tokens * whole


def results(shapes: Shapes, lora: LoraSettings | None) -> int:
    """Numbers that all matrix products and attention layers give for one token; attention one more per head."""
    adapters = sum(lora.rank + outer for *_, outer in shapes.adapted(lora)) if lora else 0
    return sum(outer for *_, outer in shapes.linears) + adapters + shapes.layers * (shapes.queries + shapes.heads)


def holes(shapes: Shapes, one: Pass, width: Width, lora: LoraSettings) -> float:
    """Bytes that the heap of a CPU's process loses in a forward pass with adapters. An adapter gives a tensor of its
    layer's output and scales it into another; both are freed, but between them lie the adapter's own small ones, which
    stay, so that nothing as large fits in again. Blocks of MMAP_THRESHOLD and more are not taken from the heap."""
    outputs = [outer for *_, outer in shapes.adapted(lora)]
    return (
        2
        * width.compute
        * sum(one.tokens * outer for outer in outputs if one.tokens * outer * width.compute < MMAP_THRESHOLD)
        / (shapes.layers if one.recomputes == "full" else 1)
    )


def passing(shapes: Shapes, one: Pass, width: Width) -> float:
    """Bytes of what comes and goes in one block, forward or backward: four tensors of the feed-forward's width."""
    return one.tokens * 4 * shapes.feed_forward * width.compute


def fused_logits(shapes: Shapes, one: Pass, width: Width, *, on_gpu: bool) -> float:
    """Bytes of the logits of TRL's fused head, which exist a tile at a time: nine copies in torch operations; with
    Triton one, of full width whatever the vocabulary."""
    tokens = min(one.tokens, TILE_TOKENS)
    if on_gpu:
        return tokens * TILE_WORDS * width.compute
    return tokens * min(shapes.vocabulary, TILE_WORDS) * width.compute * TILE_COPIES


def whole_logits(shapes: Shapes, one: Pass) -> float:
    """Bytes of the logits of a loss that has those of all tokens at once."""
    return 4 * WHOLE_COPIES * one.tokens * shapes.vocabulary


def ppo_logits(shapes: Shapes, tokens: int, *, on_gpu: bool) -> float:
    """Bytes of ppo's float32 logits for `tokens` response tokens: those that are kept, and the copies of a block."""
    block = min(tokens, MAX_TOKENS if on_gpu else CPU_BLOCK)
    all_kept = tokens if tokens <= MAX_TOKENS else 0
    return 4 * shapes.vocabulary * (all_kept + BLOCK_COPIES * block)


def kv_cache(shapes: Shapes, rows: int, width: int, size: int) -> float:
    """Bytes of the cached keys and values of `rows` sequences (Kwon et al. 2023, section 3)."""
    return 2 * shapes.layers * shapes.keys * rows * width * size


def sampling_logits(shapes: Shapes, rows: int) -> float:
    """Bytes of the logits of one sampled token per row: as computed, in float32, their logarithm, and two of float64
    for the cumulated probabilities."""
    return rows * shapes.vocabulary * (3 * 4 + 2 * 8)
