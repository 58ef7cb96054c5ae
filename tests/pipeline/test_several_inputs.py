"""Stages of the real kinds with several inputs in a slot, functions and further data: graph, jobs and identities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.errors import ConfigError, DataError
from align.job import Job
from align.pipeline.external import HashCache
from align.pipeline.fingerprint import Contents, make_jobs
from align.pipeline.graph import Node, build_graph
from align.pipeline.plan import make_plan
from align.pipeline.reasons import changes
from align.recipe.load import load_recipe
from stages import load_specs

SPECS = load_specs()
RECIPE = """
data: rows.jsonl
base: {}
sft: {data: answers.jsonl}
rm_a: {kind: reward, policy: base}
rm_b: {kind: reward}
reward: {}
ppo: {}
"""
NAMED = "ppo.reward={safe: {model: [rm_a, rm_b]}, useful: {}, short: {function: 'lengths:short'}}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a recipe, two data files and a reward function."""
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    (tmp_path / "answers.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    (tmp_path / "lengths.py").write_text("def short(batch): ...\n")
    (tmp_path / "align.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def graph(*overrides: str, stage: str = "ppo") -> list[Node]:
    """The stages needed for one."""
    return build_graph(load_recipe(Path("align.yaml"), overrides=overrides, specs=SPECS), [stage])


def jobs(*overrides: str, stage: str = "ppo") -> dict[str, Job]:
    """Their jobs, by name."""
    recipe = load_recipe(Path("align.yaml"), overrides=overrides, specs=SPECS)
    nodes = build_graph(recipe, [stage])
    contents = Contents(nodes, recipe.settings.evaluation.data)
    made = make_jobs(recipe.settings, nodes, Path("run").resolve(), HashCache(Path()), contents)
    return {job.stage: job for job in made}


def job(*overrides: str) -> Job:
    """The job of ppo."""
    return jobs(*overrides)["ppo"]


def reasons(before: Job, after: Job) -> list[str]:
    """What a plan would say about the difference; equal fingerprints mean no difference."""
    found = changes(before.identity, after.identity, {key: value.source for key, value in after.inputs.items()})
    assert (before.fingerprint == after.fingerprint) == (found == [])
    return found


def problems(*overrides: str) -> list[str]:
    """What is wrong with a graph."""
    with pytest.raises(ConfigError) as caught:
        graph(*overrides)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("override", "inputs", "needed"),
    [
        ("ppo.lam=0.9", {"reward": "reward"}, ["base", "sft", "reward", "ppo"]),
        ("ppo.reward=rm_a", {"reward": "rm_a"}, ["base", "sft", "rm_a", "ppo"]),
        (
            "ppo.reward=[rm_a, rm_b]",
            {"reward.1": "rm_a", "reward.2": "rm_b"},
            ["base", "sft", "rm_a", "rm_b", "ppo"],
        ),
        (
            NAMED,
            {"safe.1": "rm_a", "safe.2": "rm_b", "useful": "reward"},
            ["base", "sft", "rm_a", "rm_b", "reward", "ppo"],
        ),
        ("ppo.reward={short: {function: 'lengths:short'}}", {}, ["base", "sft", "ppo"]),
        ("ppo.reward={judge: {url: 'http://localhost:1'}}", {}, ["base", "sft", "ppo"]),
    ],
)
def test_every_reward_model_is_an_input_and_its_stage_is_run(
    override: str, inputs: dict[str, str], needed: list[str]
) -> None:
    """Terms without a model need none; a term that names nothing takes the stage `reward`."""
    nodes = graph(override)
    assert [node.name for node in nodes] == needed
    found = {key: source.name for key, source in nodes[-1].inputs.items()}
    assert found == {"policy": "sft", "reference": "sft", **inputs}


def test_folders_and_hub_ids_may_stand_among_stages_in_a_list(here: Path) -> None:
    """Relative folders start from the file's folder, whatever their depth in the recipe."""
    for name, architecture in (("mine", "LlamaForSequenceClassification"), ("policy", "LlamaForCausalLM")):
        (here / name).mkdir()
        (here / name / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        (here / name / "model.safetensors").write_text(name)
    pin = "a" * 40
    inputs = job(f"ppo.reward={{x: {{model: [rm_a, ./mine, 'org/name@{pin}']}}}}").inputs
    assert inputs["x.2"].path == str(here / "mine")
    assert (inputs["x.3"].path, inputs["x.3"].revision) == ("org/name", pin)
    assert problems("ppo.reward={x: {model: [rm_a, ./policy]}}") == [
        f"ppo.reward.x.2: wants a reward model; {here / 'policy'} gives a policy (did you mean 'rm_a' or 'rm_b' or "
        "'reward'?)"
    ]


def test_what_is_wrong_with_an_input_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems("ppo.reward=[rm_a, sft]")[0].startswith("ppo.reward.2: wants a reward model; sft gives a policy")
    assert problems("ppo.reward={safe: {model: sft}}")[0].startswith("ppo.reward.safe: wants a reward model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"^ppo\.reward\.safe\.1: org/name is not pinned"):
        job("ppo.reward={safe: {model: [org/name]}}")


def test_a_missing_default_is_told_for_each_term_that_wants_it(here: Path) -> None:
    (here / "align.yaml").write_text(RECIPE.replace("reward: {}\n", ""))
    told = problems("ppo.reward={a: {}, b: {model: rm_a}, c: {}}")
    assert told == [
        "ppo.reward.a: no reward model to use (add a `reward` stage, or set `ppo.reward.a:` to a model)",
        "ppo.reward.c: no reward model to use (add a `reward` stage, or set `ppo.reward.c:` to a model)",
    ]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (["ppo.reward=rm_a"], ["ppo.reward=rm_b"], ["input reward (rm_b): changed"]),
        (
            ["ppo.reward=rm_a"],
            ["ppo.reward=[rm_a, rm_b]"],
            ["input reward: removed", "input reward.1 (rm_a): added", "input reward.2 (rm_b): added"],
        ),
        (
            ["ppo.reward=[rm_a, rm_b]"],
            ["ppo.reward=[rm_b, rm_a]"],
            ["input reward.1 (rm_b): changed", "input reward.2 (rm_a): changed"],
        ),
        (
            ["ppo.reward={a: {}}"],
            ["ppo.reward={a: {}, short: {function: 'lengths:short'}}"],
            ["reward.short: added"],
        ),
        ([NAMED], [NAMED, "ppo.reward.short.weight=2"], ["reward.short.weight: 1.0 -> 2.0"]),
        ([NAMED], [NAMED, "ppo.reward.safe.combine=min"], ["reward.safe.combine: mean -> min"]),
        ([], ["ppo.ptx.data=answers.jsonl"], ["ptx: added"]),
        (["ppo.ptx.data=answers.jsonl"], ["ppo.ptx=null"], ["ptx: removed"]),
        (
            ["ppo.ptx.data=answers.jsonl"],
            ["ppo.ptx.data={path: answers.jsonl, held_out: 0.5}"],
            ["ptx.data.held_out: 0.1 -> 0.5"],
        ),
        (["ppo.reward=reward"], [], []),
        (["ppo.policy=sft"], [], []),
        ([NAMED], [NAMED, "ppo.reward.short.timeout=1"], []),
    ],
)
def test_what_changes_is_told_setting_by_setting(before: list[str], after: list[str], said: list[str]) -> None:
    """How a source is written does not count, only what it is; execution settings inside terms do not count either."""
    assert reasons(job(*before), job(*after)) == said


def test_editing_a_reward_function_changes_the_fingerprint(here: Path) -> None:
    before = job(NAMED)
    (here / "lengths.py").write_text("def short(batch): return []\n")
    (reason,) = reasons(before, job(NAMED))
    assert reason.startswith("reward.short.function: source changed (")


def test_another_function_is_one_change(here: Path) -> None:
    """Its module's source differs as well, which goes without saying."""
    (here / "longer.py").write_text("def long(batch): ...\n")
    after = job(NAMED, "ppo.reward.short.function=longer:long")
    assert reasons(job(NAMED), after) == ["reward.short.function: lengths:short -> longer:long"]


def test_further_data_counts_by_content_and_not_by_place(here: Path) -> None:
    row = (here / "answers.jsonl").read_text()
    (here / "ptx.jsonl").write_text(row)
    before = job("ppo.ptx.data=answers.jsonl")
    assert before.config["ptx"]["data"]["path"] == str(here / "answers.jsonl")
    assert reasons(before, job("ppo.ptx.data=ptx.jsonl")) == []
    (here / "ptx.jsonl").write_text(row.replace("b", "else"))
    (reason,) = reasons(before, job("ppo.ptx.data=ptx.jsonl"))
    assert reason.startswith("ptx.data: content changed (")


def test_further_data_is_read_in_its_role_before_anything_runs(here: Path) -> None:
    """Prompts alone are no demonstrations, though they are fine as the prompts of ppo itself."""
    (here / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    recipe = load_recipe(Path("align.yaml"), overrides=["ppo.ptx.data=prompts.jsonl"], specs=SPECS)
    with pytest.raises(DataError, match=r"prompts\.jsonl"):
        make_plan(recipe, ["ppo"], here / "runs" / "x")
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        job("ppo.ptx.data=gone.jsonl")
    make_plan(load_recipe(Path("align.yaml"), specs=SPECS), ["ppo"], here / "runs" / "x")


def test_equal_settings_under_two_names_are_two_models() -> None:
    """A stage's name is part of its seeds, so an ensemble of `{kind: reward}` twice has two different members."""
    made = jobs("ppo.reward=[rm_b, reward]")
    assert made["rm_b"].config == made["reward"].config
    assert made["rm_b"].fingerprint != made["reward"].fingerprint


def test_an_adapters_base_is_the_policy_of_the_stage_that_trained_it() -> None:
    """rm_a starts from base and has an adapter of 4-bit weights; rm_b, trained whole, has none."""
    made = jobs("ppo.reward=[rm_a, rm_b]", "rm_a.lora={rank: 4, quantise: nf4}", "sft.lora={rank: 2}")
    inputs = made["ppo"].inputs
    assert (inputs["reward.1"].adapter_of, inputs["reward.1"].quantise) == (made["base"].fingerprint, "nf4")
    assert (inputs["reward.2"].adapter_of, inputs["reward.2"].quantise) == (None, None)
    assert (inputs["policy"].adapter_of, inputs["policy"].quantise) == (made["base"].fingerprint, None)
    assert made["sft"].inputs["policy"].adapter_of is None


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("lengths", "'lengths' does not name a function (write `module:function`)"),
        ("lengths:", "'lengths:' does not name a function (write `module:function`)"),
        ("lenghts:short", "no module 'lenghts' (it is looked for in"),
        ("lengths:shrot", "no function 'shrot' in "),
        ("broken:short", "broken.py:2: not Python: "),
    ],
)
def test_a_function_that_is_not_there_is_told_with_its_key(here: Path, function: str, said: str) -> None:
    (here / "broken.py").write_text("import os\ndef short(:\n")
    with pytest.raises(ConfigError) as caught:
        job(f"ppo.reward={{short: {{function: '{function}'}}}}")
    assert str(caught.value).startswith("ppo.reward.short.function: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "source", ["short = print\n", "from m import a as short\n", "from m import *\n", "if 1:\n    class short: ...\n"]
)
def test_a_function_may_come_from_anywhere_in_its_module(here: Path, source: str) -> None:
    """What a module gives is not only what it defines with `def`; nothing of it is run."""
    (here / "lengths.py").write_text(source + "raise RuntimeError('imported')\n")
    assert job(NAMED).identity["config"]["reward"]["short"]["function_source"]
