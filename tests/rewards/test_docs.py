"""The examples of docs/rewards.md work as they stand."""

from __future__ import annotations

import re
import sys
import threading
from http.server import HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from align.recipe.load import load_recipe
from align.rewards.batch import RewardBatch
from align.rewards.functions import call_function, load_function
from align.rewards.remote import RemoteReward
from align.rewards.settings import RewardTerm
from stages import load_specs
from stages.ppo.config import Config

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
BATCH = RewardBatch(["a"], [[{"role": "user", "content": "a"}]], ["one, two words"], [[4, 11, 5, 6, 2]], [True])


@pytest.fixture
def examples(tmp_path, monkeypatch) -> ModuleType:
    """All Python of the page, as one module in the current folder."""
    (tmp_path / "rewards.py").write_text("".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    load_function("rewards:brief", "x")
    return sys.modules.pop("rewards")


def test_functions(examples):
    """By response: three words, -3/100. By token: the second is the comma."""
    assert call_function(examples.brief, BATCH, "x") == [-0.03]
    assert call_function(examples.few_commas, BATCH, "x") == [[0.0, -0.1, 0.0, 0.0, 0.0]]


def test_endpoint(examples):
    """14 characters: -14/500."""
    examples.Scores.log_message = lambda *_: None
    with HTTPServer(("127.0.0.1", 0), examples.Scores) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/score"
        reward = RemoteReward(RewardTerm.model_validate({"url": url}), "x")
        assert reward(BATCH) == [-14 / 500]
        reward.close()
        server.shutdown()
        thread.join()


def test_recipe(tmp_path, monkeypatch):
    """The YAML is a whole recipe, with the terms that it seems to have."""
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "path/to/model").mkdir(parents=True)
    (tmp_path / "align.yaml").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(tmp_path / "align.yaml", overrides=[], requested=["sft", "ppo"], specs=load_specs())
    config = recipe.stages["ppo"].config
    assert isinstance(config, Config)
    terms = config.reward
    assert {name: term.is_model for name, term in terms.items()} == {"helpful": True, "brief": False, "judge": False}
    assert terms["helpful"].inputs("helpful") == {"helpful.1": "reward", "helpful.2": "second"}
