"""Where inputs come from, and what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_stages import SPECS

from align.errors import ArtifactError, ConfigError
from align.pipeline.external import HashCache, local_input
from align.pipeline.graph import Node, build_graph
from align.recipe.load import load_recipe

DATA = ["data=rows.jsonl"]


def graph(
    *requested: str, overrides: list[str] | None = None, file: Path | None = None, model: str | None = None
) -> list[Node]:
    """The graph of a recipe given on the command line."""
    given = DATA + (overrides or [])
    recipe = load_recipe(file, overrides=given, requested=requested, specs=SPECS, model=model)
    return build_graph(recipe, requested)


def sources(node: Node) -> dict[str, str]:
    """Name of each input's source."""
    return {slot: source.name for slot, source in node.inputs.items()}


def problems(error: ConfigError) -> list[str]:
    """The problems of an error as text."""
    return [str(problem) for problem in error.problems]


def model(folder: Path, architecture: str = "LlamaForCausalLM", **config: object) -> Path:
    """A folder that looks like a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **config}))
    (folder / "model.safetensors").write_text("weights")
    return folder


def test_defaults_connect_the_stages_and_add_those_that_are_needed(tmp_path: Path) -> None:
    file = tmp_path / "align.yaml"
    file.write_text("ppo: {}\nreward: {}\nsft: {}\nbase: {}\n")
    nodes = graph("ppo", file=file)
    assert [node.name for node in nodes] == ["base", "sft", "reward", "ppo"]
    assert sources(nodes[-1]) == {"policy": "sft", "reference": "sft", "reward": "reward"}
    assert sources(nodes[2]) == {"policy": "sft"}


def test_a_source_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "align.yaml"
    file.write_text("base: {}\nsft: {}\nreward: {policy: base}\nppo: {reference: base}\n")
    nodes = {node.name: node for node in graph("ppo", file=file)}
    assert sources(nodes["reward"]) == {"policy": "base"}
    assert sources(nodes["ppo"]) == {"policy": "sft", "reference": "base", "reward": "reward"}


def test_the_model_replaces_stages_that_make_one_from_nothing(tmp_path: Path) -> None:
    start = str(model(tmp_path / "start"))
    file = tmp_path / "align.yaml"
    file.write_text("base: {}\nsft: {}\n")
    assert [node.name for node in graph("sft", file=file)] == ["base", "sft"]
    assert [node.name for node in graph("sft", file=file, model=start)] == ["sft"]
    assert [node.name for node in graph(file=file, model=start)] == ["sft"]
    assert [node.name for node in graph("base", "sft", file=file, model=start)] == ["base", "sft"]


def test_nothing_to_start_from_says_what_to_set() -> None:
    with pytest.raises(ConfigError) as caught:
        graph("sft")
    (problem,) = problems(caught.value)
    hint = "set `model:` or --model PATH, or add a `base` stage"
    assert problem == f"sft.policy: nothing to start from ({hint})"


def test_all_missing_inputs_and_data_are_told_at_once() -> None:
    recipe = load_recipe(None, requested=["sft", "ppo"], specs=SPECS)
    with pytest.raises(ConfigError) as caught:
        build_graph(recipe, ["sft", "ppo"])
    told = problems(caught.value)
    hint = "add a `reward` stage, or set `ppo.reward:` to a model"
    assert f"ppo.reward: no reward model to use ({hint})" in told
    assert "sft.data: no preferences (set `sft.data:` or `data:`, or --data FILE)" in told
    assert [problem.split(":")[0] for problem in told].count("sft.policy") == 1
    assert not any(problem.startswith("ppo.reference") for problem in told)


def test_no_stage_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stage to run"):
        graph(model=str(model(tmp_path)))


def test_an_artifact_of_the_wrong_kind_is_refused_with_the_right_one() -> None:
    with pytest.raises(ConfigError) as caught:
        graph("base", "sft", "reward", "ppo", overrides=["ppo.reward=sft", "sft.policy=reward"])
    told = problems(caught.value)
    assert "ppo.reward: wants a reward model; sft gives a policy (did you mean 'reward'?)" in told
    assert told[1].startswith("sft.policy: wants a policy; reward gives a reward model")


def test_a_circle_is_an_error() -> None:
    overrides = ["a={kind: sft, policy: b}", "b={kind: sft, policy: a}"]
    with pytest.raises(ConfigError, match="in a circle: "):
        graph("a", overrides=overrides)


@pytest.mark.parametrize(
    ("architecture", "slot", "fine"),
    [
        ("Qwen2ForCausalLM", "policy", True),
        ("GPT2LMHeadModel", "policy", True),
        ("Qwen2ForSequenceClassification", "reward", True),
        ("Qwen2ForSequenceClassification", "policy", False),
        ("Qwen2ForCausalLM", "reward", False),
    ],
)
def test_the_kind_of_a_folder_is_read_from_its_config(tmp_path: Path, architecture: str, slot: str, fine: bool) -> None:
    folder = model(tmp_path / "m", architecture)
    arguments = ["base", "sft", "reward", "ppo"]
    if fine:
        nodes = graph(*arguments, overrides=[f"ppo.{slot}={folder}"])
        assert sources(nodes[-1])[slot] == str(folder)
    else:
        with pytest.raises(ConfigError, match=f"ppo.{slot}: wants a"):
            graph(*arguments, overrides=[f"ppo.{slot}={folder}"])


def wrong_folder(folder: Path, case: str) -> None:
    """Makes one of the folders that must be refused."""
    model(folder)
    index = folder / "model.safetensors.index.json"
    if case == "only bin":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif case == "adapter":
        (folder / "config.json").rename(folder / "adapter_config.json")
    elif case == "no config":
        (folder / "config.json").unlink()
    elif case == "no weights":
        (folder / "model.safetensors").unlink()
    elif case == "code":
        model(folder, auto_map={"AutoModel": "evil.Model"})
    elif case == "outside":
        index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    elif case == "missing shard":
        index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    elif case == "neither":
        model(folder, "BertForMaskedLM")
    elif case == "not json":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("only bin", "only .bin weights"),
        ("adapter", "this is an adapter without its base model; merge it"),
        ("no config", "config.json is missing"),
        ("no weights", "no \\*.safetensors"),
        ("code", "auto_map"),
        ("outside", "not a plain .safetensors file name"),
        ("missing shard", "model-1.safetensors is named in"),
        ("neither", "BertForMaskedLM"),
        ("not json", "not readable as JSON"),
    ],
)
def test_a_folder_that_cannot_or_must_not_be_loaded_is_refused(tmp_path: Path, case: str, said: str) -> None:
    wrong_folder(tmp_path / "m", case)
    with pytest.raises(ArtifactError, match=said):
        graph("sft", model=str(tmp_path / "m"))


def test_code_of_a_model_runs_only_when_allowed(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", auto_map={"AutoModel": "mine.Model"})
    nodes = graph("sft", overrides=[f"model={{path: {folder}, trust_remote_code: true}}"])
    source = nodes[0].inputs["policy"].model
    assert source is not None
    assert source.trust_remote_code


def test_a_folder_is_known_by_its_content_and_hashed_once(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    cache = HashCache(tmp_path)
    first = local_input(folder, "m", cache, trust_remote_code=False)
    cache.save()
    known = json.loads((tmp_path / ".hashes.json").read_text())
    assert set(known) == {str(folder / "config.json"), str(folder / "model.safetensors")}

    (folder / "README.md").write_text("does not matter")
    assert local_input(folder, "m", HashCache(tmp_path), trust_remote_code=False) == first
    (folder / "tokenizer.json").write_text("{}")
    assert local_input(folder, "m", HashCache(tmp_path), trust_remote_code=False) != first
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").write_text("WEIGHTS")
    assert local_input(folder, "m", HashCache(tmp_path), trust_remote_code=False) != first


def test_a_damaged_hash_cache_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / ".hashes.json").write_text("[1, 2")
    folder = model(tmp_path / "m")
    assert local_input(folder, "m", HashCache(tmp_path), trust_remote_code=False).kind == "policy"
