"""A run folder with toy stages, driven through the real command line in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DEADLINE = 60.0
RECIPE = "name: toy\ndata: rows.jsonl\nbase: {}\nsft: {}\nreward: {}\nppo: {}\n"


class Toy:
    """A folder with a recipe and data."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run_dir = folder / "runs" / "toy"
        self.gate = folder / "gate"
        self.gate.mkdir()
        self.recipe()
        self.rows("good", "bad")

    def recipe(self, text: str = RECIPE) -> None:
        """Writes align.yaml."""
        (self.folder / "align.yaml").write_text(text)

    def rows(self, chosen: str, rejected: str) -> None:
        """Writes the data; every role can read it."""
        rows = [{"prompt": f"ask {n}", "chosen": f"{chosen} {n}", "rejected": f"{rejected} {n}"} for n in range(8)]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Starts `align` with the toy kinds."""
        paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, "-m", "toy_stages", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def align(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Runs `align` to its end; gives stdout and stderr together."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        return out + err

    def plan(self, *arguments: str) -> dict[str, dict[str, Any]]:
        """The stages of `align plan --json`, by name."""
        process = self.start("plan", *arguments, "--json")
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, err
        return {stage["stage"]: stage for stage in json.loads(out)["stages"]}

    def actions(self, *arguments: str) -> dict[str, str]:
        """What each stage would do."""
        return {name: stage["action"] for name, stage in self.plan(*arguments).items()}

    def hold(self, point: str) -> list[str]:
        """Makes a stage stop at `kind-point`; gives the override that lets it see the gate."""
        (self.gate / f"hold-{point}").touch()
        return [f"{point.partition('-')[0]}.gate={self.gate}"]

    def release(self, point: str) -> None:
        """Lets the stage go on."""
        (self.gate / f"hold-{point}").unlink()

    def wait_for(self, point: str) -> None:
        """Returns once a stage has reached `kind-point`."""
        wait_until((self.gate / f"reached-{point}").exists)

    def directory(self, stage: str) -> Path:
        """The only folder of a stage."""
        (folder,) = [path for path in (self.run_dir / stage).iterdir() if not path.name.startswith(".")]
        return folder

    def workers(self) -> list[int]:
        """Processes of stages of this run that live."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
                is_worker = b"align.worker" in words and b"align.launcher" not in words
                if is_worker and str(self.run_dir).encode() in words:
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def process(self, rank: int) -> int:
        """The worker with this number, of several."""
        mark = f"\0RANK={rank}\0".encode()
        (found,) = (pid for pid in self.workers() if mark in Path(f"/proc/{pid}/environ").read_bytes())
        return found

    def lines(self, stage: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a stage."""
        text = (self.directory(stage) / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


def wait_until(condition: Any) -> None:
    """Polls until the condition holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
