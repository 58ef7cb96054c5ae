"""Whole or absent: folders, small files and lines, under exceptions, damage and SIGKILL."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import ArtifactError, WriteError
from align.metrics import JsonLines, MetricsLog
from align.records import (
    MANIFEST,
    canonical_json,
    committed_folder,
    fingerprint,
    read_manifest,
    remove_folder,
    sha256_file,
    sweep,
    write_json,
    write_text,
)

KILLS = 10


def commit(target: Path, text: str = "one", **manifest: object) -> Path:
    with committed_folder(target, **manifest) as folder:
        (folder / "sub").mkdir()
        (folder / "weights").write_text(text)
        (folder / "sub" / "more").write_text(text * 2)
    return target


def damaged(folder: Path, fault: str) -> Path:
    """The folder with one thing wrong."""
    weights, manifest = folder / "weights", folder / MANIFEST
    match fault:
        case "deleted":
            weights.unlink()
        case "cut":
            weights.write_text("on")
        case "bit":
            weights.write_text("onf")
        case "link":
            weights.rename(folder.parent / "elsewhere")
            weights.symlink_to(folder.parent / "elsewhere")
        case "no manifest":
            manifest.unlink()
        case "cut manifest":
            manifest.write_text(manifest.read_text()[:-20])
        case "list manifest":
            manifest.write_text("[]")
    return folder


def test_a_committed_folder_lists_every_file(tmp_path):
    """Size and sha256 of each file at any depth, and what the stage adds; nothing else is left in the parent."""
    folder = commit(tmp_path / "model", stage="sft")
    manifest = read_manifest(folder, hashes=True)
    assert manifest["stage"] == "sft" and manifest["schema"] == 1
    assert manifest["files"] == {
        "weights": {"size": 3, "sha256": sha256_file(folder / "weights")},
        "sub/more": {"size": 6, "sha256": sha256_file(folder / "sub" / "more")},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_leaves_nothing(tmp_path, error):
    """Neither the target nor its staging folder, whatever was raised."""
    with pytest.raises(error), committed_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


def test_an_exception_inside_leaves_the_previous_version_intact(tmp_path):
    """A failed replacement does not cost the artifact that was there."""
    target = commit(tmp_path / "model", "old")
    with pytest.raises(RuntimeError), committed_folder(target) as folder:
        (folder / "weights").write_text("new")
        raise RuntimeError
    assert (target / "weights").read_text() == "old"
    read_manifest(target, hashes=True)


def test_a_replacement_is_complete(tmp_path):
    """No file of the old version survives in the new one."""
    target = commit(tmp_path / "model", "old")
    with committed_folder(target) as folder:
        (folder / "other").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == [MANIFEST, "other"]
    read_manifest(target, hashes=True)


@pytest.mark.parametrize("fault", ["deleted", "cut", "bit", "link", "no manifest", "cut manifest", "list manifest"])
def test_damage_is_found(tmp_path, fault):
    """A file that is gone, cut, changed in place or replaced by a link, and a manifest that is gone or unreadable:
    an error that names the folder. A change that keeps the size shows in the hashes only."""
    folder = damaged(commit(tmp_path / "model"), fault)
    with pytest.raises(ArtifactError, match="model"):
        read_manifest(folder, hashes=True)
    if fault == "bit":
        read_manifest(folder)
    else:
        with pytest.raises(ArtifactError, match="model"):
            read_manifest(folder)


def test_a_newer_schema_is_not_guessed_at(tmp_path):
    """A folder written by a later version: update, do not misread."""
    folder = commit(tmp_path / "model")
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, {**manifest, "schema": 2})
    with pytest.raises(ArtifactError, match=r"newer align \(manifest schema 2\); update align"):
        read_manifest(folder)


def test_sweep_removes_what_crashes_leave_and_nothing_else(tmp_path):
    """Staging folders, trash and temporary files go; artifacts and other hidden files stay."""
    commit(tmp_path / "model")
    (tmp_path / ".tmp-model-1a").mkdir()
    (tmp_path / ".tmp-model-1a" / "weights").write_text("half")
    (tmp_path / ".trash-model-2b").mkdir()
    (tmp_path / ".tmp-record.json-3c").write_text("{")
    (tmp_path / ".keep").write_text("")
    removed = sweep(tmp_path)
    assert sorted(path.name for path in removed) == [".tmp-model-1a", ".tmp-record.json-3c", ".trash-model-2b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keep", "model"]


def test_remove_folder(tmp_path):
    """Gone, with nothing left beside it."""
    remove_folder(commit(tmp_path / "model"))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_is_a_write_error(tmp_path):
    """A folder where a file is in the way, a file where a folder is: one line with the path and exit code 73."""
    (tmp_path / "file").write_text("")
    (tmp_path / "record.json").mkdir()
    for attempt in (
        lambda: commit(tmp_path / "file" / "model"),
        lambda: write_json(tmp_path / "record.json", {}),
    ):
        with pytest.raises(WriteError, match=r"(file/model|record\.json): cannot write: ") as caught:
            attempt()
        assert caught.value.exit_code == 73
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "record.json"]


def test_write_text_replaces_whole_files(tmp_path):
    """Text is exactly what was given; the folder is made; nothing temporary stays."""
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "naïve\n")
    write_text(path, "second")
    assert path.read_text(encoding="utf-8") == "second"
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"]


def test_write_json_leaves_the_old_file_when_the_value_is_no_json(tmp_path):
    """NaN is not JSON, and a value that fails half-way must not cost the record that was there."""
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    for value in ({"a": float("nan")}, {"a": {1, 2}}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, value)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["record.json"]


def test_fingerprints_are_of_values_not_of_their_order():
    """Keys in any order are the same value; everything else is another one. The text is canonical."""
    assert canonical_json({"b": [1, 2.0], "a": "ä"}) == '{"a":"ä","b":[1,2.0]}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    different = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}, {}]
    assert len({fingerprint(value) for value in different}) == len(different)


COMMITS_FOREVER = """
import sys
from pathlib import Path
from align.records import committed_folder, sweep

target = Path(sys.argv[1])
version = 0
while True:
    version += 1
    with committed_folder(target, version=version) as folder:
        for name in ("a", "b", "c"):
            (folder / name).write_text(str(version) * 50_000)
    print(version, flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_whole_folder_or_none(tmp_path):
    """A child commits in a loop and is killed at a random moment of a random commit, ten times over: whenever the
    target is there it verifies byte for byte and all its files are of one version; what is left beside it is swept."""
    rng = random.Random(0)
    target = tmp_path / "model"
    seen = 0
    for _ in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-c", COMMITS_FOREVER, str(target)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        assert child.stdout
        for _ in range(rng.randint(1, 4)):
            assert child.stdout.readline()
        for _ in range(rng.randrange(300_000)):  # a moment that depends on nothing the child does
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if target.exists():
            seen += 1
            version = read_manifest(target, hashes=True)["version"]
            for name in ("a", "b", "c"):
                assert (target / name).read_text() == str(version) * 50_000
        sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} <= {"model"}
    assert seen


def test_lines_are_written_and_read_back(tmp_path):
    """One object per line with its step; NaN and infinities are strings, at any depth."""
    log = JsonLines(tmp_path / "log.jsonl")
    assert log.read() == [] and log.last_step() == 0
    log.write(1, loss=0.5, text="ä\n")
    log.write(2, loss=float("nan"), inner={"x": [float("inf"), -float("inf")]})
    assert log.read() == [
        {"step": 1, "loss": 0.5, "text": "ä\n"},
        {"step": 2, "loss": "nan", "inner": {"x": ["inf", "-inf"]}},
    ]
    assert log.last_step() == 2
    assert log.path.read_text(encoding="utf-8").count("\n") == 2


def test_a_torn_last_line_is_no_line(tmp_path):
    """A crash in the middle of a write: the lines before it are read, and truncate_after cuts the rest off, so that
    the next line does not join it."""
    log = JsonLines(tmp_path / "log.jsonl")
    log.write(1, loss=0.5)
    with log.path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert [row["step"] for row in log.read()] == [1]
    log.truncate_after(2)
    log.write(2, loss=0.25)
    assert [row["step"] for row in log.read()] == [1, 2]


def test_truncate_after_keeps_the_step_itself(tmp_path):
    """Resuming from step 2 repeats nothing and loses nothing; truncating an absent file is a fresh start."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(0)
    for step in (1, 2, 2, 3, 4):
        log.write(step, loss=1.0)
    log.truncate_after(2)
    assert [row["step"] for row in log.read()] == [1, 2, 2]
    assert all(row["time"] > 0 for row in log.read())


def test_line_separators_inside_a_text_do_not_split_it(tmp_path):
    """A response may hold U+2028 or a form feed: lines end at newlines only."""
    log = JsonLines(tmp_path / "samples.jsonl")
    text = "a\u2028b\x0cc\x85d"
    log.write(1, response=text)
    assert log.read()[0]["response"] == text
