"""What was trained is what was saved, and what is loaded is what was saved: files, adapters, and tampering."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.errors import ArtifactError
from align.models.handover import BOUNDS, PROBES_FILE, probe_values, verify_loaded, verify_saved
from align.models.lora import add_lora, merged, trainable_parameters, without_wrapper
from align.models.opened import commit_policy, commit_reward, open_as_reward, open_policy, open_reward
from align.models.reward import normalise, score_sequences
from align.models.roles import reward_role
from align.models.save import save_model
from align.recipe.training_settings import LoraSettings
from align.records import committed_folder, read_manifest
from tests.models.tiny import model_input, probes, trained_adapter

EXACT = 1e-4
"""Sum of about 30 log-probabilities, each of a merged weight that was rounded once more in float32."""


def logprob_sums(model, sequences) -> list[float]:
    """Written out once more, without any of our code."""
    sums = []
    for ids in sequences:
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        sums.append(sum(float(logprobs[place, token]) for place, token in enumerate(ids[1:])))
    return sums


def test_saved_policy_loads_with_plain_from_pretrained(base, policy):
    """`AutoModelForCausalLM`, knowing nothing of align, gives the same log-probabilities: bound 0, the weights are
    the same bits."""
    plain = AutoModelForCausalLM.from_pretrained(base.path)
    rows = probes(policy.renderer)
    with torch.no_grad():
        assert logprob_sums(plain.eval(), rows) == logprob_sums(policy.model.eval(), rows)
    assert probe_values(plain, rows, is_reward=False) == pytest.approx(logprob_sums(plain, rows), abs=EXACT)


def test_tokenizer_template_pad_and_stop_ids_travel(base, policy):
    """What a server needs to render and to stop is in the folder."""
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert tokenizer.pad_token_id == policy.renderer.pad_id == model.config.pad_token_id
    assert tokenizer.pad_token_id not in policy.renderer.stop_ids
    stop = model.generation_config.eos_token_id
    assert (tuple(stop) if isinstance(stop, list) else (stop,)) == policy.renderer.stop_ids
    assert model.generation_config.pad_token_id == policy.renderer.pad_id
    assert model.generation_config.temperature in (None, 1.0)


def test_several_stop_ids_travel_as_a_list(policy, tmp_path):
    """An end-of-turn token that is not EOS: generation must stop at either."""
    policy.renderer.stop_ids = (1, 2)
    commit_policy(committed_folder(tmp_path / "model"), policy.model, policy, probes(policy.renderer))
    stored = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert stored["eos_token_id"] == [1, 2]


def test_artifact_is_committed_with_its_probes(base):
    """The manifest covers every file, the probe rows and their values among them."""
    files = read_manifest(Path(base.path), hashes=True)["files"]
    assert {PROBES_FILE, "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(files)
    assert len(json.loads((Path(base.path) / PROBES_FILE).read_text())["values"]) == 8


def test_a_fresh_adapter_changes_nothing(policy):
    """B = 0: training starts from the model that was loaded, and only the adapter is trained."""
    rows = probes(policy.renderer)
    before = probe_values(policy.model, rows, is_reward=False)
    everything = trainable_parameters(policy.model)
    lora = add_lora(policy.model, LoraSettings(rank=4, alpha=8))
    assert probe_values(lora, rows, is_reward=False) == before
    assert trainable_parameters(lora) < everything / 2


def test_committed_lora_policy_is_the_effective_model(base, policy, tmp_path):
    """What is saved is base + adapter, as it was in memory before merging; the adapter is kept and, put on the base
    with peft, gives the same values."""
    rows = probes(policy.renderer)
    lora = trained_adapter(policy.model)
    in_memory = probe_values(lora, rows, is_reward=False)
    folder = tmp_path / "model"
    effective, result = commit_policy(committed_folder(folder), lora, policy, rows)
    assert result["largest_difference"] < EXACT
    assert probe_values(effective, rows, is_reward=False) == pytest.approx(in_memory, abs=EXACT)
    loaded = open_policy(model_input(folder), "auto").model
    assert probe_values(loaded, rows, is_reward=False) == pytest.approx(in_memory, abs=EXACT)
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), str(folder / "adapter"))
    assert probe_values(on_base, rows, is_reward=False) == pytest.approx(in_memory, abs=EXACT)


def test_committed_lora_reward_is_the_effective_model(base, tmp_path):
    """The same for a reward model, whose head is trained in full: normalised head and offset are saved, and the
    adapter carries its normalised head."""
    opened = open_as_reward(base, "auto")
    rows = probes(opened.renderer)
    lora = trained_adapter(opened.model, is_reward=True)
    model = without_wrapper(lora)
    scores = score_sequences(reward_role(model), rows, 0).detach()
    normalise(model, float(scores.mean()), float(scores.std()))
    expected = score_sequences(reward_role(model), rows, 0).tolist()
    folder = tmp_path / "model"
    commit_reward(committed_folder(folder), lora, opened, rows)
    loaded = open_reward(model_input(folder), "auto").model
    assert score_sequences(reward_role(loaded), rows, 0).tolist() == pytest.approx(expected, abs=EXACT)
    plain = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1)
    on_base = PeftModel.from_pretrained(plain, str(folder / "adapter"))
    on_base.config.reward_offset = loaded.config.reward_offset
    assert probe_values(on_base, rows, is_reward=True) == pytest.approx(expected, abs=EXACT)


def test_only_the_trained_adapter_is_kept(policy, tmp_path):
    """DPO has a second, frozen adapter as its reference: it is neither merged nor saved."""
    rows = probes(policy.renderer)
    lora = trained_adapter(policy.model)
    in_memory = probe_values(lora, rows, is_reward=False)
    lora.add_adapter("ref", lora.peft_config["default"])
    folder = tmp_path / "model"
    commit_policy(committed_folder(folder), lora, policy, rows)
    assert not (folder / "adapter" / "ref").exists()
    loaded = open_policy(model_input(folder), "auto").model
    assert probe_values(loaded, rows, is_reward=False) == pytest.approx(in_memory, abs=EXACT)


def test_an_adapter_with_a_nan_is_not_merged(policy):
    """A broken adapter would make the whole model NaN."""
    lora = trained_adapter(policy.model)
    with torch.no_grad():
        next(parameter for name, parameter in lora.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        merged(lora)


def test_saving_another_model_than_was_trained_is_caught(policy, tmp_path):
    """The adapter left out on the way to the disk, so that the base is saved: no artifact appears."""
    rows = probes(policy.renderer)
    lora = trained_adapter(policy.model)
    trained = probe_values(lora, rows, is_reward=False)
    with (
        pytest.raises(ArtifactError, match="loaded afresh, differs from the model that was trained"),
        committed_folder(tmp_path / "model") as folder,
    ):
        save_model(lora.unload(), policy.tokenizer, folder, policy.renderer)
        verify_saved(folder, policy.tokenizer, policy.renderer, rows, trained, dtype=torch.float32, is_reward=False)
    assert not list(tmp_path.iterdir())


def test_one_changed_weight_is_caught(damaged):
    """A single number of the file set to another value."""
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][3] = 5.0
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"start: .*the loaded model differs .*weights were lost or changed"):
        open_policy(model_input(damaged), "auto")


def test_dropped_adapter_is_caught(base, policy, tmp_path):
    """Base weights copied over the effective ones: the folder still loads, the check does not pass."""
    folder = tmp_path / "model"
    commit_policy(committed_folder(folder), trained_adapter(policy.model), policy, probes(policy.renderer))
    shutil.copy(Path(base.path) / "model.safetensors", folder)
    for load in (open_policy, open_as_reward):
        with pytest.raises(ArtifactError, match="weights were lost or changed"):
            load(model_input(folder), "auto")


def test_changed_reward_head_or_offset_is_caught(reward, tmp_path):
    """The head from another run, or config.json without the offset."""
    for name in ("head", "offset"):
        folder = Path(shutil.copytree(reward.path, tmp_path / name))
        if name == "head":
            weights = load_file(folder / "model.safetensors")
            weights["score.weight"] *= 1.5
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            config = json.loads((folder / "config.json").read_text())
            del config["reward_offset"]
            (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ArtifactError, match="weights were lost or changed"):
            open_reward(model_input(folder), "auto")


def test_edited_chat_template_is_caught(damaged):
    """Another template renders other prompts than the model was trained on."""
    path = damaged / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|{{ message['role'] }}|>", "<|{{ message['role'] }}|> "))
    with pytest.raises(ArtifactError, match="the tokenizer's chat_template is not what it was"):
        open_policy(model_input(damaged), "auto")


def test_another_tokenizer_is_caught(damaged):
    """Two tokens exchanged: every text means something else."""
    path = damaged / "tokenizer.json"
    text = path.read_text()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="the tokenizer's vocabulary is not what it was"):
        open_policy(model_input(damaged), "auto")


def test_another_template_setting_is_caught(damaged, policy):
    """A chat model opened with data.template=plain has other stop ids when its turns do not end with EOS."""
    stored = json.loads((damaged / PROBES_FILE).read_text())
    stored["tokenizer"]["stop_ids"] = [1, 2]
    (damaged / PROBES_FILE).write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match=r"stop_ids .*does data\.template differ between the stages"):
        open_policy(model_input(damaged), "auto")


def test_a_nan_never_passes_the_check(damaged):
    """Comparisons with NaN are false, and a check written the other way round would let it through."""
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="differs from the model that was trained by nan"):
        open_policy(model_input(damaged), "auto")


def test_models_that_align_did_not_make_carry_no_probes(damaged):
    """They load without the check."""
    (damaged / PROBES_FILE).unlink()
    opened = open_policy(model_input(damaged), "auto")
    assert verify_loaded(opened.model, str(damaged), opened.tokenizer, opened.renderer, "damaged") is None


def test_the_bound_is_small_beside_what_training_changes(policy):
    """One adapter of rank 4 with B of size 0.1 moves a probe by a hundred times the bound."""
    rows = probes(policy.renderer)
    before = probe_values(policy.model, rows, is_reward=False)
    after = probe_values(trained_adapter(policy.model), rows, is_reward=False)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 100 * BOUNDS[torch.float32]
