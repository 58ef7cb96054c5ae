"""NF4: what the 4 bits hold, that every load gives the same ones, and that the artifact is what was trained on them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from align.data.render import Renderer
from align.errors import ArtifactError, ConfigError
from align.models.handover import PROBES_FILE, probe_values
from align.models.load import load_policy
from align.models.lora import add_lora, merged, trainable_parameters
from align.models.opened import Opened, commit_policy, commit_reward, open_as_reward, open_policy, open_reward
from align.models.quantised import NF4Linear
from align.pipeline.plan import make_plan
from align.recipe.load import load_recipe
from align.recipe.training_settings import LoraSettings
from align.records import MANIFEST, committed_folder
from stages import load_specs
from tests.models.tiny import model_input, new_tokenizer, probes, save_policy

NF4 = "nf4"
LEVELS = [
    *(-1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]
"""The 16 values of NF4 (Dettmers et al. 2023, appendix E)."""
EXACT = 1e-4
"""Sum of about 30 log-probabilities, each of a merged weight that was rounded once more in float32."""


def nf4_layers(model) -> dict[str, NF4Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}


def bits(model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Packed weights and scales of each layer of the backbone."""
    layers = nf4_layers(model.base_model).items()
    return {name: (layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()) for name, layer in layers}


def assert_same_bits(one, other) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


def trained(model, *, is_reward: bool = False):
    """An adapter that has learnt something."""
    lora = add_lora(model, LoraSettings(rank=4, alpha=8, quantise=NF4), is_reward=is_reward)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    return lora.eval()


@pytest.mark.parametrize("name", ["up_proj", "down_proj"], ids=["half a block to a row", "two blocks to a row"])
def test_each_weight_is_the_nearest_level_times_the_largest_of_its_block(base, policy, name):
    """Worked from the definition: blocks of 64 in row-major order, whatever the rows; the 16 levels times the block's
    largest absolute value. Half the widest gap is (1 - 0.696)/2 = 0.152: no weight is off by more."""
    layer = nf4_layers(load_policy(base, policy.tokenizer, torch.float32, NF4))[f"model.layers.1.mlp.{name}"]
    blocks = policy.model.get_submodule(f"model.layers.1.mlp.{name}").weight.detach().reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS)
    nearest = levels[(blocks[..., None] / scales[..., None] - levels).abs().argmin(-1)] * scales
    decoded = layer.decoded().weight.reshape(-1, 64)
    torch.testing.assert_close(decoded, nearest, rtol=1e-6, atol=0)
    assert float(((decoded - blocks).abs() / scales).max()) <= 0.152
    torch.testing.assert_close(layer.weight.quant_state.absmax, scales[:, 0], rtol=0, atol=0)


def test_bytes_per_weight(base, policy):
    """0.5 for the weight and 4/64 for its share of the scale: 0.5625, against 4 in float32. Nothing else is kept."""
    layers = nf4_layers(load_policy(base, policy.tokenizer, torch.float32, NF4)).values()
    held = sum(layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes for layer in layers)
    assert held == 0.5625 * sum(layer.in_features * layer.out_features for layer in layers)
    assert not any(layer.weight.quant_state.nested for layer in layers)


def test_backbone_is_quantised_and_nothing_else(base):
    """Every linear layer of the backbone, of a policy and of a reward model; the heads, embeddings and norms are those
    of the folder."""
    for model in (open_policy(base, "auto", quantise=NF4).model, open_as_reward(base, "auto", quantise=NF4).model):
        linear = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
        assert linear - set(nf4_layers(model)) <= {"lm_head", "score"}
        assert len(nf4_layers(model)) == 2 * 7
        stored = load_file(Path(base.path) / "model.safetensors")
        for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
            assert torch.equal(model.get_parameter(name), stored[name])


def test_every_load_gives_the_same_bits(base):
    """Twice as a policy, once as a reward model, once to be computed with in bfloat16: one NF4 base can serve all
    roles, because it is the same to the bit."""
    first = bits(open_policy(base, "auto", quantise=NF4).model)
    assert len(first) == 14
    for again in (
        open_policy(base, "auto", quantise=NF4),
        open_as_reward(base, "auto", quantise=NF4),
        open_policy(base, "auto", torch.bfloat16, NF4),
    ):
        assert_same_bits(first, bits(again.model))


def test_a_bfloat16_run_computes_in_bfloat16_with_rotary_frequencies_in_float32(base, policy):
    """dtype is that of all that is not quantised; logits are near those of float32."""
    half = open_policy(base, "auto", torch.bfloat16, NF4).model
    assert half.dtype is half.model.norm.weight.dtype is torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype is torch.float32
    ids = torch.tensor(probes(policy.renderer, 1))
    full = open_policy(base, "auto", quantise=NF4).model
    with torch.no_grad():
        logits, expected = half(input_ids=ids).logits, full(input_ids=ids).logits
    assert logits.dtype is torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_a_layer_computes_in_the_dtype_of_autocast():
    """As any linear layer under autocast, and its own bias stays what it was."""
    layer = tiny_layer()
    before = layer.bias.clone()
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = torch.nn.functional.linear(x.bfloat16(), layer.decoded().weight.bfloat16(), before.bfloat16())
    torch.testing.assert_close(y, expected.float(), rtol=0, atol=0)
    assert layer.bias.dtype is torch.float32 and torch.equal(layer.bias, before)
    torch.testing.assert_close(layer(x), layer.decoded()(x), rtol=0, atol=0)


def tiny_layer() -> NF4Linear:
    torch.manual_seed(0)
    layer = NF4Linear(64, 32, quant_type=NF4, compress_statistics=False).to("cpu")
    layer.source_cls = torch.nn.Linear
    return layer


def test_sampling_and_scoring_leave_the_weights_alone(base, policy):
    """The library's own layer, in evaluation mode on a CPU with bfloat16 instructions, repacks its weights and rounds
    their scales: what is trained afterwards would be another model. Training and evaluation compute the same, and
    nothing is changed by either."""
    model = open_policy(base, "auto", quantise=NF4).model
    before = bits(model)
    ids = torch.tensor(probes(policy.renderer, 1))
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids).logits
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.train()(input_ids=ids).logits, evaluated)
    assert_same_bits(before, bits(model))


def test_model_computes_what_the_decoded_weights_compute(base, policy):
    """Against a model in full whose weights are replaced by quantised and decoded ones, made by the library's
    functions."""
    model = open_policy(base, "auto", quantise=NF4).model
    with torch.no_grad():
        for name in nf4_layers(model):
            weight = policy.model.get_submodule(name).weight
            packed, state = quantize_4bit(weight.data, blocksize=64, quant_type=NF4, compress_statistics=False)
            decode = torch.tensor(LEVELS)[torch.stack([packed >> 4, packed & 15], -1).flatten().long()]
            weight.copy_((decode.reshape(-1, 64) * state.absmax[:, None]).reshape(weight.shape))
    rows = probes(policy.renderer)
    expected = probe_values(policy.model, rows, is_reward=False)
    assert probe_values(model, rows, is_reward=False) == pytest.approx(expected, abs=EXACT)


def test_only_the_adapter_is_trained_and_in_float32(base):
    """Adapter and head of a reward model are float32, whatever the base: in bfloat16 an update below 0.4 % of a weight
    is lost. Gradients reach them through the 4 bits, and nothing else."""
    for dtype in (torch.float32, torch.bfloat16):
        opened = open_as_reward(base, "auto", dtype, NF4)
        lora = add_lora(opened.model, LoraSettings(rank=4, alpha=8, quantise=NF4), is_reward=True)
        names = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
        assert names and all("lora_" in name or "modules_to_save" in name for name in names)
        assert {lora.get_parameter(name).dtype for name in names if "lora_" in name} == {torch.float32}
        lora(input_ids=torch.tensor(probes(opened.renderer, 1))).logits.sum().backward()
        with_gradient = {name for name, parameter in lora.named_parameters() if parameter.grad is not None}
        assert with_gradient == names
    assert trainable_parameters(lora) == sum(lora.get_parameter(name).numel() for name in names)


def test_gradient_through_the_base_is_that_of_the_decoded_weights():
    """dL/dx of a frozen layer is dL/dy W, with W the decoded weights."""
    layer = tiny_layer()
    x = torch.randn(5, 64, requires_grad=True)
    upstream = torch.randn(5, 32)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.decoded().weight, rtol=1e-6, atol=1e-6)


def test_committed_policy_is_the_decoded_base_plus_the_adapter(base, tmp_path):
    """What was trained, in full: a plain folder with no word of quantisation, equal to the trained model within float32
    rounding; the adapter is kept, and on the decoded base gives the same."""
    opened = open_policy(base, "auto", quantise=NF4)
    rows = probes(opened.renderer)
    lora = trained(opened.model)
    in_memory = probe_values(lora, rows, is_reward=False)
    decoded = {name: layer.decoded().weight for name, layer in nf4_layers(lora).items()}
    folder = tmp_path / "model"
    _, result = commit_policy(committed_folder(folder), lora, opened, rows)
    assert result["largest_difference"] < EXACT
    assert result["quantisation_moved"] == opened.quantisation_moved > 0
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not nf4_layers(plain) and type(plain.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert probe_values(plain, rows, is_reward=False) == pytest.approx(in_memory, abs=EXACT)
    on_base = AutoModelForCausalLM.from_pretrained(base.path)
    with torch.no_grad():
        for name, weight in decoded.items():
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            on_base.get_submodule(name).weight.copy_(weight)
    on_base = PeftModel.from_pretrained(on_base, str(folder / "adapter"))
    assert probe_values(on_base, rows, is_reward=False) == pytest.approx(in_memory, abs=EXACT)


def test_the_sum_is_not_quantised_again(base):
    """Merged back into 4 bits, as peft does, the adapter would be rounded to the levels: the merged weight differs from
    the decoded one by exactly the adapter's update, in float32."""
    lora = trained(open_policy(base, "auto", quantise=NF4).model)
    layer = lora.base_model.model.model.layers[0].mlp.up_proj
    expected = layer.base_layer.decoded().weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = merged(lora).model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


def test_committed_reward_is_the_decoded_base_plus_the_adapter(base, tmp_path):
    """The same for a reward model, whose head was trained in full."""
    opened = open_as_reward(base, "auto", quantise=NF4)
    rows = probes(opened.renderer)
    lora = trained(opened.model, is_reward=True)
    scores = probe_values(lora, rows, is_reward=True)
    folder = tmp_path / "model"
    _, result = commit_reward(committed_folder(folder), lora, opened, rows)
    assert result["quantisation_moved"] > 0
    loaded = open_reward(model_input(folder, "reward"), "auto").model
    assert probe_values(loaded, rows, is_reward=True) == pytest.approx(scores, abs=EXACT)


def test_a_bfloat16_run_hands_over_in_float32(base, tmp_path):
    """The sum of base and adapter is not rounded to bfloat16, and a stage that computes in float32 can open it: the
    bound of the check is that of the run it was trained in."""
    opened = open_policy(base, "auto", torch.bfloat16, NF4)
    folder = tmp_path / "model"
    _, result = commit_policy(committed_folder(folder), trained(opened.model), opened, probes(opened.renderer))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert result["bound"] == 0.5 and result["largest_difference"] > 0
    open_policy(model_input(folder), "auto")


@pytest.mark.parametrize("name", ["actor", "default"])
def test_only_the_named_adapter_is_merged(base, name):
    """A base with the adapters of several roles: the one asked for is merged, the others leave no trace."""
    alone = add_lora(open_policy(base, "auto", quantise=NF4).model, LoraSettings(rank=4, alpha=8))
    several = add_lora(open_policy(base, "auto", quantise=NF4).model, LoraSettings(rank=4, alpha=8))
    for other in {"actor", "critic"}:
        several.add_adapter(other, several.peft_config["default"])
    torch.manual_seed(5)
    with torch.no_grad():
        for key, parameter in several.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.1)
                if f".{name}." in key:
                    alone.get_parameter(key.replace(f".{name}.", ".default.")).copy_(parameter)
    one, other = merged(alone), merged(several, name)
    for (key, weight), expected in zip(other.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0, msg=key)


def test_transposed_layers_of_gpt2(base, policy, tmp_path):
    """GPT-2 keeps its weights transposed (Conv1D): quantised, trained and committed, it is a GPT-2 again."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=1, n_head=2, bos_token_id=1)
    start = Opened(GPT2LMHeadModel(config), tokenizer, Renderer(tokenizer))
    source = save_policy(start, tmp_path / "gpt2")
    opened = open_policy(source, "auto", quantise=NF4)
    assert len(nf4_layers(opened.model)) == 4
    folder = tmp_path / "model"
    _, result = commit_policy(committed_folder(folder), trained(opened.model), opened, probes(opened.renderer))
    assert result["largest_difference"] < EXACT
    assert type(open_policy(model_input(folder), "auto").model) is GPT2LMHeadModel


def test_another_model_in_the_folder_is_caught_byte_for_byte(base, tmp_path):
    """One weight of the file changed by less than quantisation moves it: in 4 bits the probes cannot tell, the sha256
    can."""
    folder = Path(shutil.copytree(base.path, tmp_path / "changed"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.safetensors: content differs from the manifest's sha256"):
        open_policy(model_input(folder), "auto", quantise=NF4)


def test_lost_weights_are_caught_by_the_probes(base, tmp_path):
    """A folder whose files are what the manifest says, with probes that are off by 0.75 nats per token: weights that
    were lost while loading. What quantisation moves is far below the bound."""
    assert 0 < open_policy(base, "auto", quantise=NF4).quantisation_moved < 0.25
    with committed_folder(tmp_path / "model") as folder:
        shutil.copytree(base.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        stored = json.loads((folder / PROBES_FILE).read_text())
        pairs = zip(stored["values"], stored["probes"], strict=True)
        stored["values"] = [value + 0.75 * len(probe) for value, probe in pairs]
        (folder / PROBES_FILE).write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match=r"in 4 bits the model differs .* nats per token \(bound 0\.5\)"):
        open_policy(model_input(tmp_path / "model"), "auto", quantise=NF4)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ("lora: {quantise: nf4}", "lora.quantise: nf4"),
        ("optim: {kind: adamw-8bit, lr: 1}", "optim.kind: adamw-8bit"),
    ],
)
def test_without_bitsandbytes_the_plan_says_what_to_install(settings, what, tmp_path, monkeypatch):
    """Found before anything runs: exit code 2, and the command that helps. None in sys.modules is Python's own way of
    saying that a package cannot be imported."""
    recipe = tmp_path / "align.yaml"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say hat", "response": "hat ."}\n' * 4)
    recipe.write_text(f"data: rows.jsonl\nbase: {{}}\nsft: {{{settings}}}\n")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError) as caught:
        make_plan(load_recipe(recipe, specs=load_specs()), ["sft"], tmp_path / "runs" / "run")
    assert str(caught.value) == f"sft.{what} needs bitsandbytes (pip install 'align-rlhf[quant]')"
    assert caught.value.exit_code == 2
