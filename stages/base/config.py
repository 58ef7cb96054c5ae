"""Settings of `base`: a small language model made from scratch. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from align.recipe.data_settings import Data, Role
from align.recipe.launch_settings import LaunchSettings
from align.recipe.settings import Settings, execution
from align.recipe.spec import Kind, StageSpec
from align.recipe.training_settings import OptimSettings

KEPT_CHECKPOINTS = 2


class Config(Settings):
    """A Llama-shaped model and its byte-level BPE tokenizer, trained on a corpus. For demos and tests."""

    kind: Literal["base"] = "base"
    """Stage kind."""

    data: Data | None = None
    """The corpus: rows with a `text`, or any rows whose texts are used. None: the recipe's `data`."""

    vocabulary: Annotated[int, Field(ge=260)] = 1024
    """Size of the tokenizer's vocabulary, special tokens included. 260 is the least: every byte and four specials."""

    embeddings: PositiveInt | None = None
    """Rows of the embedding. More than the vocabulary are padding, as most published models have. None: as many."""

    context: PositiveInt = 256
    """Longest sequence the model is made for, in tokens."""

    hidden: PositiveInt = 128
    """Width of the residual stream."""

    layers: PositiveInt = 4
    """Number of blocks."""

    heads: PositiveInt = 4
    """Attention heads; must divide `hidden`."""

    steps: Annotated[int, Field(ge=0)] = 200
    """Optimiser steps of next-token training on the corpus. 0 leaves the weights random."""

    batch_size: PositiveInt = 32
    """Sequences per step, over all processes."""

    sequence_length: PositiveInt = 64
    """Tokens per sequence; the corpus is packed, documents separated by EOS."""

    optim: OptimSettings = OptimSettings(lr=3e-3, warmup=0.05, schedule="cosine", betas=(0.9, 0.95))
    """Optimiser."""

    log_every: PositiveInt = execution(10)
    """Optimiser steps between lines of metrics.jsonl."""

    launch: LaunchSettings | None = execution(None)
    """Processes of this stage. None: the recipe's `launch`."""

    seed: int | None = None
    """None: the recipe's seed."""

    def architecture(self) -> dict[str, Any]:
        """The config.json of the model, as far as it does not depend on the tokenizer: Llama, embeddings tied. Without
        `embeddings`, a corpus too small for the vocabulary makes a smaller one."""
        return {
            "model_type": "llama",
            "vocab_size": self.embeddings or self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.context,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
        }

    def process_problems(self, processes: int) -> dict[str, str]:
        """As `Settings.process_problems`."""
        if self.batch_size % processes:
            return {"batch_size": f"batch_size {self.batch_size} cannot be divided among {processes} processes"}
        return {}

    @model_validator(mode="after")
    def _shapes(self) -> Config:
        if self.hidden % self.heads:
            raise ValueError(f"heads {self.heads} does not divide hidden {self.hidden}")
        if self.embeddings is not None and self.embeddings < self.vocabulary:
            raise ValueError(f"embeddings {self.embeddings} are fewer than the vocabulary's {self.vocabulary}")
        if self.sequence_length > self.context:
            raise ValueError(f"sequence_length {self.sequence_length} is over context {self.context}")
        return self


SPEC = StageSpec(
    kind="base",
    version=2,
    summary="make a small model and its tokenizer from scratch",
    config=Config,
    output=Kind.POLICY,
    run="stages.base.run:run",
    data=Role.CORPUS,
    workload="stages.base.memory:workload",
    distributed=True,
)
