"""`align run dpo` and `align run kto` on every public shape that serves them: from the published columns to a committed
model, on a tiny one. All but one in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.data.rows import Preference
from align.recipe.data_settings import Role
from align.records import read_manifest
from tests.data.test_public import PUBLIC, TRL, talk
from tests.stages.harness import Run

CASES = {**TRL, **PUBLIC}
PAIRS = {name: case for name, case in CASES.items() if case.role is Role.PREFERENCES}
JUDGED = {name: case for name, case in CASES.items() if case.role is Role.JUDGEMENTS}
OPPOSITE = {
    "unpaired, standard": [{"prompt": "A number?", "completion": " red.", "label": False}],
    "unpaired, conversational": [
        {"prompt": talk("A number?"), "completion": [{"role": "assistant", "content": "Seven."}], "label": True}
    ],
    "unpaired, of a preference": [],
}
ONE_STEP = {"max_steps": 1, "max_length": 1024, "optim": {"lr": 1e-3}}


def written(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(run: Run) -> int:
    """Runs a stage and returns on how many rows; its model is whole and differs from the start."""
    result = run()
    assert read_manifest(run.model, hashes=True)["files"]
    assert (run.model / "model.safetensors").read_bytes() != Path(run.policy.path, "model.safetensors").read_bytes()
    return result.metrics["rows"]


@pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS)
def test_dpo(case, base, tmp_path):
    """As many pairs are trained on as the table of shapes says."""
    assert all(isinstance(row, Preference) for row in case.expected)
    data = {"path": str(written(tmp_path, list(case.rows))), "held_out": 0.0, **case.settings}
    run = Run("dpo", tmp_path / "runs" / "dpo" / "only", base, {**ONE_STEP, "data": data})
    assert trained(run) == len(case.expected)


@pytest.mark.parametrize("name", JUDGED)
def test_kto(name, base, tmp_path):
    """Answers that were judged, with one more so that some are good and some bad; and a pair as two of them."""
    rows = [*JUDGED[name].rows, *OPPOSITE[name]]
    data = {"path": str(written(tmp_path, rows)), "held_out": 0.0}
    run = Run("kto", tmp_path / "runs" / "kto" / "only", base, {**ONE_STEP, "data": data})
    assert trained(run) == 2


def test_command_line(base, tmp_path):
    """Judged answers without a recipe, as a user starts kto; a part of twelve prompts is held out. (dpo:
    tests/end_to_end/test_chain.py.)"""
    rows = [{"prompt": f"Colour {n}?", "completion": "Blue.", "label": n % 2 == 0} for n in range(12)]
    written(tmp_path, rows)
    command = [sys.executable, "-m", "align", "run", "kto", "--model", base.path, "--data", "rows.jsonl"]
    done = subprocess.run(
        [*command, "kto.max_steps=1", "evaluation.max_response_tokens=8"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = tmp_path.glob("runs/*/kto/*/record.json")
    metrics = json.loads(record.read_text(encoding="utf-8"))["metrics"]
    assert 6 <= metrics["rows"] < 12
    assert metrics["rows"] + metrics["good"] + metrics["bad"] == 12
