"""Counting on the meta device gives what real models have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.models.load import disable_dropout
from align.models.lora import add_lora, trainable_parameters
from align.models.packed import pack, packed_states
from align.pipeline.estimate.activations import Width, per_token
from align.pipeline.estimate.shapes import Counter, Shapes
from align.recipe.training_settings import LoraSettings
from align.shapes import model_shapes
from tests.pipeline.estimate.models import FAMILIES, TINY

LORA = LoraSettings(rank=8)
FLOAT32 = Width(4, 4)


def shapes_of(family: str) -> Shapes:
    return Shapes.read(model_shapes({"model_type": family, **FAMILIES[family]}))


def real(family: str):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).train()
    disable_dropout(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_the_real_model(family):
    """All, those of an adapter on every linear layer, and those of one on some."""
    shapes, model = shapes_of(family), real(family)
    assert shapes.parameters == model.num_parameters()
    assert shapes.backbone == model.base_model.num_parameters()
    names = sorted({name.rpartition(".")[2] for name, *_ in shapes.linears})[:1]
    for lora in (LORA, LORA.model_copy(update={"target_modules": names})):
        assert shapes.adapter(lora) == trainable_parameters(add_lora(real(family), lora))


def kept_bytes(model, *, packed: bool = False) -> float:
    """Bytes per token that autograd really keeps in a forward pass of the body, weights and masks left out."""
    body = model.get_base_model().base_model if hasattr(model, "get_base_model") else model.base_model
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    ids, kept = torch.arange(400).view(4, 100) % 300, {}
    mask = torch.ones_like(ids)
    if not packed:
        mask[0, 90:] = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point() and tensor.shape[-2:] != (100, 100):
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, or its address would be given again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        if packed:
            packed_states(body, ids, mask, mask.cumsum(1) - 1)
        else:
            body(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(size for size, _ in kept.values()) / ids.numel()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neox"])
def test_activations_are_what_autograd_keeps(family):
    """Within 15%, with all weights trained, with adapters, and packed. What is left out does not grow with the width,
    and 64 is narrow: rotations, one number for each norm."""
    shapes = shapes_of(family)
    assert per_token(shapes, FLOAT32) == pytest.approx(kept_bytes(real(family)), rel=0.15)
    adapted = add_lora(real(family), LORA)
    disable_dropout(adapted)
    assert per_token(shapes, FLOAT32, LORA) == pytest.approx(kept_bytes(adapted), rel=0.15)
    packed = real(family)
    assert pack(packed.base_model)
    assert per_token(shapes, FLOAT32, packed=True) == pytest.approx(kept_bytes(packed, packed=True), rel=0.16)


def test_adapters_and_four_bits_by_hand():
    """q_proj: rank 3 * (8 + 8) in 2 blocks. NF4: 2 * 672 weights of 0.5625 bytes, the other 120 of 4."""
    some = LoraSettings(rank=3, target_modules=["q_proj"])
    assert TINY.adapter(some) == 2 * 3 * 16
    assert TINY.adapter(LoraSettings(rank=3, target_modules=r".*0\.mlp\.up_proj")) == 3 * 28
    assert TINY.frozen_bytes(4, "nf4", TINY.parameters) == 1344 * 0.5625 + 120 * 4
    assert TINY.frozen_bytes(2, None, TINY.parameters) == 2 * TINY.parameters


def test_gate_is_told_from_widths():
    assert TINY.is_gated and TINY.feed_forward == 20
    assert not shapes_of("gpt2").is_gated


def test_answers_are_remembered_and_experts_refused(tmp_path: Path):
    """The second question starts no process; a mixture of experts has no answer, and one wrong config does not end the
    process for those after it."""
    config = {"model_type": "llama", **FAMILIES["llama"]}
    mixture = {"model_type": "mixtral", **FAMILIES["llama"], "num_local_experts": 4}
    counter = Counter(tmp_path)
    assert counter.shapes(mixture) is None
    assert counter.shapes({"model_type": "nonsense"}) is None
    found = counter.shapes(config)
    counter.close()
    again = Counter(tmp_path)
    assert found == again.shapes(config) == shapes_of("llama")
    assert again._process is None
