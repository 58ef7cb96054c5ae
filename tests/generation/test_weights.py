"""Where a policy's weights lie in an engine's, and that they get there by every way."""

from __future__ import annotations

import torch
from torch import nn

from align.generation.weights import HandOver, effective_weights, locate
from align.models.lora import merged
from tests.generation.vllm_models import make_model, optimise


class Fused(nn.Module):
    """An engine's layer: q (4 rows), k and v (2 rows each) in one, and an embedding padded from 5 rows to 8."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.qkv = nn.Linear(3, 8, bias=False, dtype=dtype)
        self.embed = nn.Embedding(8, 3, dtype=dtype)

    def load(self, pairs) -> None:
        """What an engine's own loader does."""
        places = {
            "q.weight": (self.qkv, 0),
            "k.weight": (self.qkv, 4),
            "v.weight": (self.qkv, 6),
            "embed.weight": (self.embed, 0),
        }
        for name, tensor in pairs:
            module, first = places[name.removeprefix("layer.")]
            with torch.no_grad():
                module.weight[first : first + len(tensor)] = tensor


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, rows, bias=False) for rows in (4, 2, 2))
        self.embed = nn.Embedding(5, 3)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Layer()


class Engine(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.layer = Fused(dtype)


FUSED = {"qkv": ["q", "k", "v"]}


def test_rows_of_fused_and_padded_parameters():
    policy, engine = Policy(), Engine()
    found = locate(effective_weights(policy), dict(engine.named_parameters()), FUSED)
    starts = {
        name: (target.data_ptr() - engine.layer.qkv.weight.data_ptr()) // (3 * 4) for name, target in found.items()
    }
    assert [starts[f"layer.{name}.weight"] for name in "qkv"] == [0, 4, 6]
    assert found["layer.embed.weight"].data_ptr() == engine.layer.embed.weight.data_ptr()
    assert [tuple(found[f"layer.{name}.weight"].shape) for name in ("q", "k", "v", "embed")] == [
        (4, 3),
        (2, 3),
        (2, 3),
        (5, 3),
    ]


def test_a_weight_without_a_place_makes_everything_unknown():
    policy, engine = Policy(), Engine()
    policy.layer.extra = nn.Linear(3, 3, bias=False)
    assert locate(effective_weights(policy), dict(engine.named_parameters()), FUSED) == {}


def test_shared_weights_are_the_engines_memory_and_stay_right():
    policy, engine = Policy(), Engine()
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    handover = HandOver(policy, engine, engine.layer.load, FUSED)
    assert handover.summary == "4 weights shared"
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
    with torch.no_grad():
        policy.layer.k.weight.add_(1)  # an optimiser step
    assert torch.equal(engine.layer.qkv.weight[4:6], before["layer.k.weight"] + 1)
    policy.layer.v.weight.data = torch.zeros(2, 3)  # other memory, behind the hand-over's back
    assert handover.differing() == ["layer.v.weight"]
    handover.sync()
    assert handover.differing() == [] and torch.equal(engine.layer.qkv.weight[6:], torch.zeros(2, 3))


def test_another_dtype_is_copied():
    policy, engine = Policy(), Engine(torch.bfloat16)
    handover = HandOver(policy, engine, engine.layer.load, FUSED)
    assert handover.summary == "4 weights copied"
    with torch.no_grad():
        policy.layer.q.weight.add_(1)
    assert handover.differing() == ["layer.q.weight"]
    handover.sync()
    assert handover.differing() == []
    assert torch.equal(engine.layer.qkv.weight[:4], policy.layer.q.weight.bfloat16())


def test_a_place_that_the_engines_own_loader_contradicts_is_not_used():
    """An engine that keeps v before k under the same names: its loader knows, the names do not say."""
    policy, engine = Policy(), Engine()

    def load(pairs):
        swap = {"layer.k.weight": "layer.v.weight", "layer.v.weight": "layer.k.weight"}
        engine.layer.load((swap.get(name, name), tensor) for name, tensor in pairs)

    handover = HandOver(policy, engine, load, FUSED)
    assert handover.summary == "4 weights written by the engine's own loader"
    with torch.no_grad():
        policy.layer.k.weight.fill_(7)
    handover.sync()
    assert torch.equal(engine.layer.qkv.weight[6:], torch.full((2, 3), 7.0))


def test_release_gives_the_policy_its_own_memory():
    policy, engine = Policy(), Engine()
    handover = HandOver(policy, engine, engine.layer.load, FUSED)
    expected = policy.layer.q.weight.detach().clone()
    handover.release()
    nn.init.zeros_(engine.layer.qkv.weight)
    assert torch.equal(policy.layer.q.weight, expected)


def test_effective_weights_are_those_of_the_merged_model(tmp_path):
    """Names and values under which peft's own merge would save them, a tied embedding once."""
    model = make_model(tmp_path, "qwen2", tied=True, dtype=torch.float32, lora=True)
    optimise(model, 2)
    found = {weight.name: weight.effective().clone() for weight in effective_weights(model)}
    plain = merged(model)
    expected = dict(plain.named_parameters())
    assert found.keys() == expected.keys() and "lm_head.weight" not in found
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-6
