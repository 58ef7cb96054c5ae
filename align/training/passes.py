"""How a stage on TRL computes its passes."""

from __future__ import annotations

from typing import Any

from align.models.lora import without_wrapper
from align.models.packed import leave_out_padding
from align.models.partitioned import layer_by_layer
from align.models.recomputation import recompute
from align.recipe.training_settings import TrainingSettings


def prepare_passes(model: Any, config: TrainingSettings) -> None:
    """What a model recomputes, and whether it sees padding."""
    recompute(model, config.gradient_checkpointing)
    # Noise on embeddings is scaled by the length of a row (Jain et al. 2023), and there would be a single long one.
    if config.padding_free and not config.trainer_args.get("neftune_noise_alpha"):
        with layer_by_layer(model):  # it is tried out before DeepSpeed's engine runs the model
            leave_out_padding(without_wrapper(model).base_model)
