"""A toy run in a folder with an ugly name, and a fake Slurm on PATH."""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from pathlib import Path

from toy_run import Toy

HERE = Path(__file__).parent
TOYS = HERE.parent / "pipeline"

COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol")
UGLY = 'it\'s a "run" $(touch broken)\n`touch broken`; & * é'
"""A folder's name in which every mistake of quoting shows."""


class Cluster:
    """A toy run in a folder with an ugly name, and the fake Slurm on PATH."""

    def __init__(self, folder: Path):
        project = folder / UGLY
        project.mkdir()
        self.toy = Toy(project)
        self.toy.gate = folder / "gate"  # an override is YAML, which folds line breaks
        self.toy.gate.mkdir()
        self.state = folder / "slurm"
        self.state.mkdir()
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in COMMANDS:
            self.program(name, f'exec {shlex.quote(sys.executable)} {HERE / "fake_slurm.py"} {name} "$@"')
        start = f"shift 2  # -m align\nexec {shlex.quote(sys.executable)} -m toy_stages"
        self.python = self.program("toy python", f'export PYTHONPATH={TOYS}:$PYTHONPATH\n{start} "$@"')
        self.environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.state),
            "PYTHONPATH": f"{TOYS}:{os.environ.get('PYTHONPATH', '')}",
        }

    def program(self, name: str, body: str) -> Path:
        """Puts a command on PATH."""
        path = self.programs / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    def align(self, *arguments: str, code: int = 0) -> str:
        """`align` with toy stages."""
        return self.toy.align(*arguments, code=code, **self.environment)

    def submit(self, *arguments: str, code: int = 0) -> str:
        """`align submit --to slurm`."""
        settings = [f"submit.python={self.python}", "submit.gpus=0"]
        return self.align("submit", *arguments, *settings, "--to", "slurm", code=code)

    def slurm(self, *arguments: str) -> None:
        """One of the commands of the fake Slurm, also those that only it has."""
        program = [sys.executable, str(HERE / "fake_slurm.py"), *arguments]
        subprocess.run(program, env={**os.environ, **self.environment}, check=True, timeout=60)

    def bash(self, *arguments: str | Path, code: int = 0) -> str:
        """Runs bash as a user would; gives what it says on stderr."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(["bash", *arguments], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stderr

    def finish(self) -> None:
        """Returns when every job has ended: each holds a lock as long as it lives."""
        for lock in sorted(self.state.glob("*/lock")):
            with lock.open() as stream:
                fcntl.flock(stream, fcntl.LOCK_SH)
