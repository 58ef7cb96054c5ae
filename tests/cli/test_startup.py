"""The command line starts without the stack, and what goes wrong reaches the user without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from align.cli import app, main
from align.errors import ArtifactError, ConfigError, Interrupted, Problem

CONFIGS = Path(__file__).parents[2] / "configs"
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


def run(monkeypatch, raised: BaseException | None, *arguments: str) -> int | str | None:
    """The exit status of `align show` when it raises, or of other arguments."""
    if raised is not None:

        def fail(*_: object) -> None:
            raise raised

        monkeypatch.setattr("align.cli.show._show_kinds", fail)
    monkeypatch.setattr("sys.argv", ["align", *(arguments or ("show",))])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["run", "--help"],
        ["submit", "--help"],
        ["status", "--help"],
        ["show"],
        ["show", "ppo"],
        ["show", "rloo"],
        ["show", "ppo", "--json"],
        ["env"],
        ["init", "--list"],
        ["data", "check", f"{CONFIGS}/demo/heldout.jsonl"],
        ["data", "show", f"{CONFIGS}/demo/heldout.jsonl", "--row", "1"],
        ["data", "card", "demo-heldout", "--check", "--cards", f"{CONFIGS}/../data_cards", "--root", f"{CONFIGS}"],
    ],
    ids=" ".join,
)
def test_no_command_of_these_imports_the_stack(command):
    code = f"""
import sys
sys.argv = ["align", *{command}]
from align.cli import main
try:
    main()
except SystemExit as status:
    assert not status.code, status.code
loaded = sorted(set({HEAVY}) & set(sys.modules))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_checking_trainer_args_imports_no_stack(tmp_path):
    code = f"""
import sys
from align.errors import ConfigError
from align.recipe.load import load_recipe
from stages import load_specs
try:
    load_recipe(None, overrides=["sft.trainer_args.packin=true"], specs=load_specs())
except ConfigError as error:
    assert "did you mean `packing`?" in str(error)
assert not set({HEAVY}) & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path)


def test_completion_imports_no_stack():
    code = f"""
import sys
from align.cli.complete import complete_run_argument
assert complete_run_argument("pp") == ["ppo"]
assert not set({HEAVY}) & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_python_m_align_is_the_command():
    done = subprocess.run([sys.executable, "-m", "align", "show"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "PPO from a reward model" in done.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("x"), 2), (ArtifactError("x"), 4), (Interrupted("x"), 75), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    assert run(monkeypatch, error) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_message_is_one_unfolded_line_and_its_brackets_are_not_markup(monkeypatch, capsys):
    text = "[red]x[/red] [/nonsense] " + "long " * 40 + "end"
    run(monkeypatch, ArtifactError(text))
    assert capsys.readouterr().err == f"error: {text}\n"


def test_several_problems_are_counted_and_listed(monkeypatch, capsys):
    run(monkeypatch, ConfigError([Problem("a:1", "one"), Problem("b:2", "two", "three")]))
    assert capsys.readouterr().err == "2 errors:\na:1: one\nb:2: two (three)\n"


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr("align.cli.show._show_kinds", lambda *_: 1 / 0)
    monkeypatch.setattr("sys.argv", ["align", "show"])
    with pytest.raises(ZeroDivisionError):
        main()
    assert app.pretty_exceptions_show_locals is False


def test_usage_errors_exit_2_and_name_the_nearest(monkeypatch, capsys):
    assert run(monkeypatch, None, "rum") == 2
    assert "run" in capsys.readouterr().err
