"""Loading: every weight comes from the folder, PAD is a token of its own, and broken folders are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from align.errors import ArtifactError
from align.models.load import (
    disable_dropout,
    load_policy,
    load_tokenizer,
    new_reward,
)
from align.models.opened import open_as_reward, open_policy, open_reward
from tests.models.tiny import CONFIG, drop_weight, model_input, new_tokenizer, save_foreign

FP32 = torch.float32


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("pad", [None, "<|end|>"], ids=["no PAD", "PAD is EOS"])
def test_a_tokenizer_gets_a_pad_of_its_own(tmp_path, pad):
    """GPT-2 and Llama have no PAD, others use EOS: align adds one, and a row for it."""
    source = model_input(save_foreign(tmp_path / "foreign", pad))
    tokenizer = load_tokenizer(source)
    model = load_policy(source, tokenizer, FP32)
    assert tokenizer.pad_token_id == CONFIG.vocabulary - 1 != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().num_embeddings == CONFIG.vocabulary


def test_two_loads_of_a_model_that_lacks_a_pad_row_agree(tmp_path):
    """Policy and frozen reference are two loads: a new row drawn at random would make them differ from the start."""
    source = model_input(save_foreign(tmp_path / "foreign", None))
    first, second = open_policy(source, "plain").model, open_policy(source, "plain").model
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    table = first.get_input_embeddings().weight
    torch.testing.assert_close(table[-1], table[:-1].mean(0))


def test_a_missing_weight_is_an_error_not_a_random_one(damaged):
    """The library would draw it at random and warn; align names it."""
    drop_weight(damaged, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ArtifactError, match=r"start: .*does not hold all weights.*layers\.1\.mlp\.up_proj"):
        open_policy(model_input(damaged), "auto")


def test_a_reward_model_without_its_head_is_refused(reward, tmp_path):
    """The field's most repeated hand-over bug: score.weight is not in the file, the library makes a random one."""
    folder = Path(shutil.copytree(reward.path, tmp_path / "headless"))
    drop_weight(folder, "score.weight")
    with pytest.raises(ArtifactError, match=r"score\.weight; they would be random"):
        open_reward(model_input(folder), "auto")


def test_a_policy_is_no_reward_model_and_a_reward_model_is_no_policy(base, reward):
    """Both load as the other in the library, with a random head or with the head left out."""
    with pytest.raises(ArtifactError, match=r"score\.weight.*right kind of model"):
        open_reward(base, "auto")
    for load in (open_policy, open_as_reward):
        with pytest.raises(ArtifactError, match="is a reward model"):
            load(reward, "auto")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", None),
        ("model.safetensors", None),
        ("model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"),
        ("model.safetensors", b"x" * 1000),
    ],
)
def test_broken_folders_are_named_in_one_line(damaged, file, content):
    """A file that is missing or cut is the user's to fix: one line with stage and folder, whatever the library
    raised."""
    if content is None:
        (damaged / file).unlink()
    else:
        (damaged / file).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"^start: (cannot load )?{damaged}") as caught:
        open_policy(model_input(damaged), "auto")
    assert "\n" not in str(caught.value)


def test_a_folder_that_does_not_exist(tmp_path):
    """Neither a folder nor a hub id."""
    with pytest.raises(ArtifactError, match=r"start: cannot load .*nowhere"):
        open_policy(model_input(tmp_path / "nowhere"), "auto")


def test_an_adapter_alone_is_refused(damaged):
    """The library would load the base named in it and save only the adapter again."""
    (damaged / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is an adapter, not a whole model"):
        open_policy(model_input(damaged), "auto")


def test_a_new_reward_head_has_the_variance_of_the_paper(base, policy):
    """N(0, 1/(d+1)) of Ziegler et al. 2019: over many heads of d = 32 the standard deviation is 33^-0.5 = 0.174."""
    torch.manual_seed(0)
    heads = [new_reward(base, policy.tokenizer, FP32).score.weight.detach() for _ in range(40)]
    assert heads[0].shape == (1, 32)
    assert float(torch.cat(heads).std()) == pytest.approx(33**-0.5, rel=0.1)


def test_dropout_is_off_in_train_mode_too(damaged):
    """The ratio of new to old policy must be 1 at the first step: a config that asks for dropout does not get it."""
    edit_json(damaged / "config.json", attention_dropout=0.5)
    model = load_policy(model_input(damaged), new_tokenizer(), FP32).train()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_disable_dropout_reaches_every_module():
    """Also those that are nested."""
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout(0.1)))
    disable_dropout(model)
    x = torch.ones(100)
    assert torch.equal(model.train()(x), x)
