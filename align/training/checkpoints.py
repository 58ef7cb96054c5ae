"""Checkpoints inside a stage: committed folders `step-<n>`. The newest one that verifies is resumed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align import ranks
from align.context import Context
from align.errors import ArtifactError, ConfigError
from align.records import read_manifest, remove_folder, sweep

PREFIX = "step-"

ONE_PROCESS = {"processes": 1, "zero": 0}
"""The layout of a checkpoint that names none: of a version that knew no other."""


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is committed."""
    return checkpoints / f"{PREFIX}{step}"


def _by_step(checkpoints: Path) -> list[tuple[int, Path]]:
    return sorted((int(folder.name.removeprefix(PREFIX)), folder) for folder in checkpoints.glob(f"{PREFIX}*"))


def newest_valid(checkpoints: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint whose every byte verifies; None when there is none at all.

    Damaged ones are passed over. Raises ArtifactError when checkpoints exist and none verifies: starting again from
    step 0 would silently throw work away.
    """
    sweep(checkpoints)
    found = _by_step(checkpoints)
    faults = []
    for step, folder in reversed(found):
        try:
            read_manifest(folder, hashes=True)
            return step, folder
        except ArtifactError as error:
            faults.append(str(error))
    if faults:
        raise ArtifactError(
            f"{checkpoints}: no checkpoint verifies; remove the folder to start the stage again\n" + "\n".join(faults)
        )
    return None


def resumable(context: Context, layout: dict[str, Any]) -> tuple[int, Path] | None:
    """The checkpoint that processes of this layout (align.training.sharding) go on from, the same in all of them.
    Raises ConfigError when others than these wrote it."""
    found = ranks.share(newest_valid(context.checkpoints) if context.is_main else None)
    if found is None:
        return None
    stage, wrote = context.job.stage, read_manifest(found[1]).get("layout", ONE_PROCESS)
    if wrote != layout:
        raise ConfigError(
            f"{stage}: its checkpoint of step {found[0]} was written by {describe(wrote)}, and these are "
            f"{describe(layout)}; go on with `launch` as it was, or start again with --force {stage}"
        )
    return found


def describe(layout: dict[str, Any]) -> str:
    """A layout in words."""
    how = "fsdp" if "fsdp" in layout else f"zero{layout['zero']}" if layout["zero"] else "ddp"
    how += " with a disk" if "disk" in layout else ""
    return f"{layout['processes']} processes under {how}" if layout["processes"] > 1 else f"1 process under {how}"


def keep_newest(checkpoints: Path, count: int, step: int) -> None:
    """Removes all but the newest `count` checkpoints up to that of `step`, which was just committed. Later ones are
    damaged, or resuming would have started from them: they do not count."""
    for _, folder in [one for one in _by_step(checkpoints) if one[0] <= step][:-count]:
        remove_folder(folder)
