"""`align env`: facts for a bug report."""

from __future__ import annotations

import json
from importlib.metadata import version

from typer.testing import CliRunner

from align.cli import app


def env(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["env", *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_json_and_table_say_the_same():
    facts = json.loads(env("--json"))
    assert facts["packages"]["trl"] == version("trl")
    assert facts["cores"] >= 1 and facts["memory_gb"] > 0
    table = env()
    assert f"trl {version('trl')}" in table and facts["platform"] in table


def test_gpus_are_those_nvidia_smi_lists(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'H100, 81559 MiB, 580.1'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert json.loads(env("--json"))["gpus"] == ["H100, 81559 MiB, 580.1"]


def test_a_failing_nvidia_smi_is_reported(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert "failed" in json.loads(env("--json"))["gpus"][0]


def test_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert json.loads(env("--json"))["gpus"] == []
