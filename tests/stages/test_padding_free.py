"""Passes without padding in the stages on TRL: the losses and gradients of padded ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from align.models.packed import NAME, leave_out_padding
from align.models.roles import causal_role
from align.training.passes import prepare_passes
from align.training.trainer import run_training
from tests.models.test_roles import new_model
from tests.stages.harness import KINDS, LORA
from tests.stages.test_training import make_trainer

LOSS, GRADIENT, WEIGHT = 2e-6, 1e-5, 1e-5
"""Bounds: of a loss, absolute; of a gradient's norm, relative; of a weight after six steps, absolute. Only the order of
sums differs."""


@pytest.mark.parametrize(("kind", "lora"), [*((kind, False) for kind in KINDS), ("dpo", True)])
def test_the_run_of_padded_batches(kind, lora, finished, new_run, tmp_path):
    """Six steps of rows of unequal lengths."""
    straight, _ = finished(kind, lora=lora)
    padded = new_run(kind, tmp_path, padding_free=False, **(LORA if lora else {}))
    padded()
    for ours, theirs in zip(straight.metrics(), padded.metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=LOSS)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=GRADIENT)
    mine, other = (load_file(run.model / "model.safetensors") for run in (straight, padded))
    assert max(float((mine[name] - other[name]).abs().max()) for name in mine) < WEIGHT


def test_what_trainers_ask_for_sees_no_padding_and_all_else_does():
    """Two rows of 3 and 6 tokens: the layers see 9 of 12 places, in a pass for the last states. A pass that wants all
    hidden states, or a cache, is as it was; greedy generation too."""
    model = new_model("Llama").eval()
    ids, mask = torch.arange(5, 17).view(2, 6), torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    plain = {"input_ids": ids, "attention_mask": mask}
    expected = model.model(**plain, use_cache=False).last_hidden_state
    left = {"input_ids": ids, "attention_mask": mask.flip(1), "max_new_tokens": 4, "do_sample": False}
    answers = model.generate(**left)
    shapes: list[torch.Size] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape[:2]))
    assert leave_out_padding(model.model)
    found = model.model(**plain, use_cache=False).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-6)
    assert not found[~mask.bool()].any()
    assert shapes[-1] == (1, 9)
    assert len(model.model(**plain, use_cache=False, output_hidden_states=True).hidden_states) == 3
    assert model.model(**plain, use_cache=True).past_key_values is not None
    assert shapes[-2:] == [(2, 6), (2, 6)]
    assert torch.equal(model.generate(**left), answers)
    torch.testing.assert_close(causal_role(model).states(ids, mask, mask.cumsum(1) - 1), found, rtol=0, atol=0)


def test_attention_that_cannot_stays_padded():
    """Gemma 2 caps its scores and looks at a window."""
    model = new_model("Gemma2")
    before = model.model.forward
    assert not leave_out_padding(model.model)
    assert model.model.forward == before and model.config._attn_implementation != NAME


def test_a_training_pass_sees_no_padding(new_run, tmp_path):
    """The layers of a trained model get one row of as many tokens as the batch has."""
    run = new_run("sft", tmp_path, max_steps=1)
    trainer, model, context = make_trainer(run)
    prepare_passes(model, run.config())
    seen: list[tuple[torch.Size, int]] = []
    model.model.embed_tokens.register_forward_hook(
        lambda _module, inputs, output: seen.append((output.shape[:2], int((inputs[0] != pad).sum())))
    )
    pad = model.config.pad_token_id
    run_training(trainer, context, keep_checkpoints=2, shown={})
    ((rows, places), tokens) = seen[0]
    assert (rows, places) == (1, tokens)
