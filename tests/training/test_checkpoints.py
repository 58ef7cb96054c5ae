"""Which checkpoint is resumed from: the newest whose every byte verifies, and never silently none."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.errors import ArtifactError
from align.records import MANIFEST, committed_folder
from align.training.checkpoints import checkpoint_folder, keep_newest, newest_valid


def commit(checkpoints: Path, step: int) -> Path:
    with committed_folder(checkpoint_folder(checkpoints, step), step=step) as folder:
        (folder / "weights").write_bytes(b"w" * 100)
    return checkpoint_folder(checkpoints, step)


def test_newest_is_by_number_not_by_name(tmp_path):
    """step-10 is newer than step-9, whatever the alphabet says."""
    for step in (9, 10, 2):
        commit(tmp_path, step)
    assert newest_valid(tmp_path) == (10, tmp_path / "step-10")


def test_none_at_all_is_a_fresh_start(tmp_path):
    """No folder, an empty folder, or nothing but what an interrupted commit left: that is swept away."""
    assert newest_valid(tmp_path / "absent") is None
    (tmp_path / ".tmp-step-1-abc").mkdir()
    (tmp_path / ".trash-step-0-abc").mkdir()
    assert newest_valid(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["bit", "cut", "gone", "manifest gone", "manifest cut"])
def test_damaged_newest_is_passed_over(tmp_path, fault):
    """Whatever happened to the newest, the one before it is used; when it is the only one, that is an error."""
    older, newer = commit(tmp_path, 4), commit(tmp_path, 8)
    for folder in (newer, older):
        damage(folder, fault)
        if folder == newer:
            assert newest_valid(tmp_path) == (4, older)
    with pytest.raises(ArtifactError, match="no checkpoint verifies; remove the folder") as caught:
        newest_valid(tmp_path)
    assert "step-4" in str(caught.value) and "step-8" in str(caught.value)


def test_keep_newest_counts_only_up_to_the_step_just_committed(tmp_path):
    """After falling back from a damaged step 20 to 10, the checkpoint of 12 is kept and the damaged one left alone."""
    for step in (10, 12, 20):
        commit(tmp_path, step)
    keep_newest(tmp_path, 1, step=12)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-12", "step-20"]


def test_keep_newest(tmp_path):
    """The oldest go, completely."""
    for step in (2, 4, 10):
        commit(tmp_path, step)
    keep_newest(tmp_path, 2, step=10)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-10", "step-4"]


def damage(folder: Path, fault: str) -> None:
    weights, manifest = folder / "weights", folder / MANIFEST
    if fault == "bit":
        weights.write_bytes(b"w" * 50 + b"v" + b"w" * 49)
    elif fault == "cut":
        weights.write_bytes(b"w" * 60)
    elif fault == "gone":
        weights.unlink()
    elif fault == "manifest gone":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:-30])
