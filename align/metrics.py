"""Metrics as lines of JSON: metrics.jsonl is the truth that reports, tests and resume read. Dashboards are extra."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from align.records import write_text


class JsonLines:
    """An append-only file of JSON objects, one per line, each with a `step`.

    A line is written whole and flushed. A torn last line (a crash in the middle of a write) is ignored by the reader
    and cut off by `truncate_after`.
    """

    def __init__(self, path: Path, *, writes: bool = True):
        self.path, self.writes = path, writes  # of many processes only one writes

    def write(self, step: int, **values: Any) -> None:
        """Appends one line. NaN and infinities are written as the strings "nan", "inf", "-inf": never hidden."""
        if not self.writes:
            return
        line = json.dumps({"step": step, **{key: _plain(value) for key, value in values.items()}}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines, oldest first; an absent file is empty."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def last_step(self) -> int:
        """The step of the last line, 0 when there is none."""
        rows = self.read()
        return rows[-1]["step"] if rows else 0

    def truncate_after(self, step: int) -> None:
        """Drops lines beyond `step`, so that a resumed stage does not write a step twice."""
        if not self.writes:
            return
        rows = [row for row in self.read() if row["step"] <= step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self.path, text)


class MetricsLog(JsonLines):
    """metrics.jsonl: numbers by step, stamped with the wall-clock time in seconds."""

    def write(self, step: int, **values: Any) -> None:
        super().write(step, time=round(time.time(), 3), **values)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
