"""Loading right recipes: what wins, what is kept, where paths start, and the resolved form."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from align.errors import ConfigError
from align.recipe.load import Recipe, load_recipe
from stages import load_specs

SPECS = load_specs()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str | None = None, *overrides: str, **options) -> Recipe:
    path = None
    if text is not None:
        path = Path("recipes/align.yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides=list(overrides), specs=SPECS, **options)


def config(recipe: Recipe, stage: str):
    return recipe.stages[stage].config


def test_no_file_is_all_defaults():
    recipe = load(requested=["dpo"])
    assert recipe.path is None
    assert list(recipe.stages) == ["dpo"]
    assert config(recipe, "dpo") == SPECS["dpo"].config()


def test_stages_are_those_of_the_file_then_requested_then_overridden():
    recipe = load("ppo:\nsft: {epochs: 2}\n", "base.steps=5", requested=["reward", "ppo"])
    assert list(recipe.stages) == ["ppo", "sft", "reward", "base"]
    assert config(recipe, "base").steps == 5


def test_a_kind_can_be_used_under_another_name():
    overrides = ("loose.kind=dpo", "loose.beta=0.1", "other={kind: ppo}")
    recipe = load("strict: {kind: dpo, beta: 0.5}\n", *overrides)
    assert {name: stage.kind for name, stage in recipe.stages.items()} == {
        "strict": "dpo",
        "loose": "dpo",
        "other": "ppo",
    }
    assert config(recipe, "strict").beta == 0.5
    assert config(recipe, "loose").beta == 0.1


def test_a_part_of_a_nested_setting_keeps_the_stages_own_defaults():
    """`base` has a cosine schedule; giving a learning rate must not bring back the linear default."""
    optim = config(load("base: {optim: {lr: 1e-3}}\n", "base.optim.eps=1e-7"), "base").optim
    default = SPECS["base"].config().optim
    assert (optim.lr, optim.eps) == (1e-3, 1e-7)
    assert (optim.schedule, optim.warmup, optim.betas) == (default.schedule, default.warmup, default.betas)
    assert default.schedule == "cosine"


def test_defaults_two_levels_down_are_kept():
    critic = config(load(None, "ppo.critic.optim.weight_decay=0.1"), "ppo").critic
    assert critic.optim.lr == SPECS["ppo"].config().critic.optim.lr
    assert critic.optim.weight_decay == 0.1


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("ppo.optim.lr=1e-5", lambda ppo: ppo.optim.lr == 1e-5),
        ("ppo.kl={coef: 0.3}", lambda ppo: ppo.kl.coef == 0.3),
        ("ppo.clip.value=null", lambda ppo: ppo.clip.value is None),
        ("ppo.optim.betas=[0.8, 0.9]", lambda ppo: ppo.optim.betas == (0.8, 0.9)),
        ("ppo.whiten_advantages=false", lambda ppo: ppo.whiten_advantages is False),
        ("ppo.gamma=1", lambda ppo: ppo.gamma == 1.0),
        ("ppo={seed: 3}", lambda ppo: ppo.seed == 3),
    ],
)
def test_override_values_are_yaml(override, read):
    assert read(config(load("ppo: {kl: {coef: 0.2}, rollouts: 3}\n", override), "ppo"))


def test_the_last_override_wins():
    assert load("seed: 1\n", "seed=2", "seed=3").settings.seed == 3


def test_an_override_replaces_a_mapping_whole():
    data = load("data: {path: a.jsonl, held_out: 0.3}\n", "data=b.jsonl").settings.data
    assert data is not None and data.held_out == 0.1


def test_an_override_goes_into_a_shorthand():
    data = load("data: a.jsonl\n", "data.held_out=0.3").settings.data
    assert data is not None and data.held_out == 0.3
    assert Path(str(data.path)).name == "a.jsonl"


def test_optional_settings_take_the_defaults_of_their_class():
    lora = config(load("sft: {lora: {rank: 4}}\n", "dpo.lora.alpha=8"), "sft").lora
    assert (lora.rank, lora.alpha) == (4, 32.0)


def test_text_that_looks_like_something_else_stays_text():
    data = load('data: {path: a.jsonl, system: "no", columns: {prompt: "012"}}\n').settings.data
    assert data is not None and (data.system, data.columns) == ("no", {"prompt": "012"})


def test_paths_of_the_file_start_from_its_folder_and_of_the_command_line_from_here(folder):
    recipe = load(
        "data: a.jsonl\nevaluation: {data: e.json}\nsft: {data: {path: [b.jsonl, /c.jsonl], held_out_path: d.csv}}\n",
        "dpo.data.path=f.jsonl",
        data="g.jsonl",
    )
    sft, dpo = config(recipe, "sft").data, config(recipe, "dpo").data
    assert recipe.settings.data and recipe.settings.data.path == str(folder / "g.jsonl")
    assert sft.path == [str(folder / "recipes/b.jsonl"), "/c.jsonl"]
    assert sft.held_out_path == str(folder / "recipes/d.csv")
    assert dpo.path == str(folder / "f.jsonl")
    assert recipe.settings.evaluation.data
    assert recipe.settings.evaluation.data.path == str(folder / "recipes/e.json")


def test_data_that_is_not_a_local_path_is_left_alone():
    data = load("data: Anthropic/hh-rlhf\n").settings.data
    assert data is not None and data.path == "Anthropic/hh-rlhf"


def test_models_are_folders_or_hub_ids(folder):
    (folder / "my@model").mkdir()
    local = load(None, model="my@model").settings.model
    assert local is not None and (local.path, local.revision) == (str(folder / "my@model"), None)
    hub = load(None, "model=org/name@" + "a" * 40).settings.model
    assert hub is not None and (hub.path, hub.revision) == ("org/name", "a" * 40)


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(ConfigError, match="'' is neither a folder nor a hub id"):
        load(None, model="")


def test_model_option_replaces_revision_and_trust(folder):
    (folder / "m").mkdir()
    text = f"model: {{path: org/name, revision: {'a' * 40}, trust_remote_code: true}}\n"
    model = load(text, model="m").settings.model
    assert model is not None and (model.revision, model.trust_remote_code) == (None, False)


def test_inputs_are_stage_names_before_folders(folder):
    for name in ("sft", "elsewhere"):
        (folder / name).mkdir()
    recipe = load("sft:\n", "dpo.policy=sft", "ppo.policy=elsewhere", "ppo.reference=org/name@v1")
    assert config(recipe, "dpo").policy == "sft"
    assert config(recipe, "ppo").policy == str(folder / "elsewhere")
    assert config(recipe, "ppo").reference == "org/name@v1"


@pytest.mark.parametrize(
    ("written", "terms"),
    [
        ("", {"reward": None}),
        ("rm", {"reward": "rm"}),
        ("[rm, ./m]", {"reward": ["rm", "recipes/m"]}),
        ("{safe: {model: ./m}, good: {model: [rm]}}", {"safe": "recipes/m", "good": ["rm"]}),
    ],
)
def test_reward_models_are_found_at_any_depth(folder, written, terms):
    """Stages keep their names, folders of the file start from the file's folder."""
    (folder / "recipes/m").mkdir(parents=True)
    found = {
        name: term.model
        for name, term in config(load(f"rm: {{kind: reward}}\nppo: {{reward: {written}}}\n"), "ppo").reward.items()
    }

    def absolute(name):
        return str(folder / name) if "/" in name else name

    assert found == {
        term: [absolute(name) for name in model] if isinstance(model, list) else model and absolute(model)
        for term, model in terms.items()
    }


def test_reward_models_on_the_command_line_start_from_here(folder):
    (folder / "m").mkdir()
    reward = config(load("reward:\nppo: {reward: reward}\n", "ppo.reward.other.model=[m]"), "ppo").reward
    assert {name: term.model for name, term in reward.items()} == {"reward": "reward", "other": [str(folder / "m")]}


def test_a_term_is_changed_without_losing_the_others():
    reward = config(
        load("ppo: {reward: {a: {weight: 2}, b: {url: 'http://x'}}}\n", "ppo.reward.b.retries=1"), "ppo"
    ).reward
    assert (reward["a"].weight, reward["b"].retries, reward["b"].url) == (2.0, 1, "http://x")


def test_a_relative_of_ppo_keeps_its_own_defaults():
    """grpo measures the KL as a loss (k2); giving its coefficient must not bring back ppo's k1."""
    kl = config(load("grpo: {kl: {coef: 0.1}}\n"), "grpo").kl
    assert (kl.coef, kl.estimator) == (0.1, "k2")


def test_further_data_is_located_like_the_rest(folder):
    recipe = load("ppo: {ptx: {data: a.jsonl}}\n", "rloo.ptx.data.path=b.jsonl")
    assert config(recipe, "ppo").ptx.data.path == str(folder / "recipes/a.jsonl")
    assert config(recipe, "rloo").ptx.data.path == str(folder / "b.jsonl")


def test_a_shorthand_is_named_as_it_was_written():
    """The item of a list on its own line; the whole key once the file says it in full."""
    text = "ppo:\n  reward:\n    - a\nrloo:\n  reward:\n    reward:\n      model:\n        - b\nreward:\n"
    with pytest.raises(ConfigError) as error:
        load(text, "grpo.reward=[c]")
    assert [str(problem).split(": '")[0] for problem in error.value.problems] == [
        "recipes/align.yaml:3: ppo.reward[0]",
        "recipes/align.yaml:8: rloo.reward.reward.model[0]",
        "grpo.reward=[c] (command line): grpo.reward[0]",
    ]


def test_data_option_is_used_when_one_requested_stage_has_no_data_of_its_own():
    recipe = load("sft: {data: a.jsonl}\n", requested=["sft", "dpo"], data="b.jsonl")
    assert recipe.settings.data is not None


def test_a_stage_that_names_no_files_changes_the_recipes_data_for_itself(folder):
    """With --data and with the file's `data`; paths are absolute and stay as they are."""
    recipe = load(
        "data: {path: a.jsonl, held_out: 0.3}\nsft: {data: {system: Be brief.}}\nreward:\n", "dpo.data.held_out=0.2"
    )
    sft, dpo = config(recipe, "sft").data, config(recipe, "dpo").data
    path = str(folder / "recipes/a.jsonl")
    assert (sft.path, sft.held_out, sft.system) == (path, 0.3, "Be brief.")
    assert (dpo.path, dpo.held_out, dpo.system) == (path, 0.2, None)
    assert config(recipe, "reward").data is None
    option = load(None, "dpo.data.max_rows=5", requested=["dpo"], data="b.jsonl")
    assert config(option, "dpo").data.path == str(folder / "b.jsonl")
    assert config(option, "dpo").data.max_rows == 5
    assert option.settings.data and option.settings.data.max_rows is None


def test_a_stage_that_names_its_files_takes_nothing_of_the_recipes_data():
    text = "data: {path: a.jsonl, held_out: 0.3}\nsft: {data: b.jsonl}\nppo: {data: {mixture: {c: c.jsonl}}}\n"
    recipe = load(text, "sft.data.max_rows=5")
    assert config(recipe, "sft").data.held_out == 0.1
    assert config(recipe, "ppo").data.path is None


@pytest.mark.parametrize(
    "text",
    [
        "name: x\n",
        "seed: 3\ntrack: [mlflow]\nmodel: a/b@v1\ndata: {path: a.jsonl, columns: {prompt: q}}\nppo:\n",
        "base: {steps: 0}\nsft: {lora: {rank: 2}, trainer_args: {packing: true}}\nx: {kind: dpo}\n",
        "rm: {kind: reward}\nppo: {reward: [rm, a/b@v1], ptx: {data: a.jsonl}}\n",
        "rloo:\ngrpo: {reward: {s: {function: 'a:b'}, r: {}}}\n",
        "evaluation: {gold: 'a.b:c', data: e.jsonl}\nppo: {clip: {value: null}, data: [a.jsonl]}\n",
    ],
)
def test_a_resolved_recipe_loads_back_equal(text, folder):
    recipe = load(text)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    copy = elsewhere / "recipe.yaml"
    copy.write_text(yaml.safe_dump(recipe.resolved(), sort_keys=False), encoding="utf-8")
    again = load_recipe(copy, specs=SPECS)
    assert again == recipe
    assert again.resolved() == recipe.resolved()


def test_problems_of_the_file_come_by_line_then_the_command_line():
    with pytest.raises(ConfigError) as error:
        load("ppo: {rolouts: 1}\nseed: -1\ndata: {path: 1}\n", "ppo.zz=1", "seeed=1")
    wheres = [problem.where for problem in error.value.problems]
    path = "recipes/align.yaml"
    assert wheres == [
        f"{path}:1",
        f"{path}:2",
        f"{path}:3",
        "ppo.zz=1 (command line)",
        "seeed=1 (command line)",
    ]


def test_a_file_outside_the_current_folder_is_named_in_full(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "r.yaml"
    path.write_text("sed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^{path}:1: sed: "):
        load_recipe(path, specs=SPECS)


def test_the_parts_of_a_mixture_start_from_the_files_folder(folder):
    """Paths, shorthands, patterns and overrides work inside a mixture; data sets of the hub stay as they are."""
    text = "sft:\n  data:\n    mixture: {a: a.jsonl, b: {path: [b/*, org/name@main]}}\n    decontaminate: test.csv.gz\n"
    data = config(load(text, "sft.data.mixture.a.fraction=0.5"), "sft").data
    assert data.mixture["a"].path == str(folder / "recipes" / "a.jsonl")
    assert data.mixture["a"].fraction == 0.5
    assert data.mixture["b"].path == [str(folder / "recipes" / "b/*"), "org/name@main"]
    assert data.decontaminate == str(folder / "recipes" / "test.csv.gz")
