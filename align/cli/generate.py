"""`align generate`: answers to a file of prompts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from align.cli.app import app
from align.errors import ArtifactError, ConfigError, Problem
from align.pipeline.external import HashCache, local_input
from align.pipeline.processes import ENVIRONMENT
from align.recipe.spec import Kind
from align.records import write_json

NAMES: dict[str, str] = {Kind.POLICY: "policy", Kind.REWARD: "reward model"}


class Engine(StrEnum):
    """What generates; see `align show ppo`, rollout.engine."""

    AUTO = "auto"
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


@app.command()
def generate(
    prompts: Annotated[Path, typer.Argument(help="A data file; only its prompts are used.", show_default=False)],
    model: Annotated[Path, typer.Option(help="Folder of a policy, or of the stage that made it.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write.", show_default=False)],
    responses: Annotated[int, typer.Option("--responses", "-n", min=1, help="Responses to each prompt.")] = 1,
    reward: Annotated[
        Path | None, typer.Option(help="Folder of a reward model that scores them.", show_default=False)
    ] = None,
    best_of: Annotated[
        int, typer.Option(min=1, help="Sample this many for each response, and keep the one with the highest score.")
    ] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.001, help="Sampling temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same responses.")] = 0,
    engine: Annotated[Engine, typer.Option(help="What generates. auto: vLLM where it is installed.")] = Engine.AUTO,
) -> None:
    """Answer prompts with a trained policy; with a reward model, best of several."""
    problems = []
    if output.exists():
        problems.append(Problem(str(output), "already exists, and is not overwritten", "choose another --output"))
    if best_of > 1 and reward is None:
        problems.append(Problem("--best-of", "needs a reward model to say which is best", "add --reward FOLDER"))
    if problems:
        raise ConfigError(problems)
    order = {
        "prompts": str(prompts),
        "output": str(output),
        "policy": _model(model, Kind.POLICY),
        "reward": None if reward is None else _model(reward, Kind.REWARD),
        "num_responses": responses,
        "best_of": best_of,
        "max_response_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "engine": str(engine),
    }
    with tempfile.TemporaryDirectory(prefix="align-") as folder:
        path = Path(folder) / "order.json"
        write_json(path, order)
        # In a process of its own: this one never loads torch.
        command = [sys.executable, "-m", "align.sampler", str(path)]
        code = subprocess.run(command, env=ENVIRONMENT | os.environ).returncode
    raise typer.Exit(code)


def _model(folder: Path, wanted: Kind) -> dict[str, Any]:
    """A local model as an input, as JSON. Raises ArtifactError for what is none, or of another kind."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    found = local_input(folder.resolve(), str(folder), HashCache(folder), trust_remote_code=False)
    if found.kind != wanted:
        raise ArtifactError(f"{folder}: this is a {NAMES[found.kind]}; a {NAMES[wanted]} is needed here")
    return asdict(found)
