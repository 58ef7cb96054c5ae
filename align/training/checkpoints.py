"""Checkpoints inside a stage: committed folders `step-<n>`. The newest one that verifies is resumed from."""

from __future__ import annotations

from pathlib import Path

from align.errors import ArtifactError
from align.records import read_manifest, remove_folder, sweep

PREFIX = "step-"


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


def keep_newest(checkpoints: Path, count: int, step: int) -> None:
    """Removes all but the newest `count` checkpoints up to that of `step`, which was just committed. Later ones are
    damaged, or resuming would have started from them: they do not count."""
    for _, folder in [one for one in _by_step(checkpoints) if one[0] <= step][:-count]:
        remove_folder(folder)
