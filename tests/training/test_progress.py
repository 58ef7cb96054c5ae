"""What a person sees when the output is a file: a line now and then, and always the last one."""

from __future__ import annotations

from align.training.progress import StageProgress


def test_the_last_step_is_always_printed(capsys):
    """Lines come at most every 15 seconds; a short stage prints one, with its numbers."""
    with StageProgress("sft", 3, "steps") as progress:
        for step in (1, 2, 3):
            progress.show(step, loss=1.23456 / step)
    assert capsys.readouterr().err.splitlines() == ["  sft 3/3 steps  loss 0.4115"]


def test_silent_on_the_other_processes(capsys):
    """Only one process of many talks."""
    with StageProgress("sft", 1, "steps", enabled=False) as progress:
        progress.show(1, loss=1.0)
    assert capsys.readouterr().err == ""
