"""Which files a path stands for, and how their bytes are read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from align.data.faults import FileFault
from align.data.files import FileRows
from align.data.load import content_hash, load
from align.data.readers import read
from align.data.sources import DataFile, files_of
from align.data.streams import opened
from align.errors import DataError
from align.recipe.data_settings import DataSettings, ReadSettings, Role
from tests.data.wrong_data import gz, zst

LINE = b'{"prompt": "Hi"}\n'
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(*names: str, content: bytes = LINE) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def names(path: str, pattern: str | None = None) -> list[str]:
    return [file.name for file in files_of(path, pattern)]


def test_a_folder_stands_for_its_data_files() -> None:
    """Below it too, in order of their names; not what is hidden, no data, or written beside data by `datasets`."""
    make("d/b.jsonl", "d/a/c.csv.gz", "d/.cache/x.jsonl", "d/README.md", "d/dataset_info.json", "d/state.json")
    assert names("d") == ["d/a/c.csv.gz", "d/b.jsonl"]


def test_files_choose_among_those_of_a_folder() -> None:
    """A name, a pattern whose `*` stops at a slash, or a folder."""
    make("d/train-0.jsonl", "d/train-1.jsonl", "d/test-0.jsonl", "d/more/train-2.jsonl")
    assert names("d", "train-*.jsonl") == ["d/train-0.jsonl", "d/train-1.jsonl"]
    assert names("d", "more") == names("d", "more/*.jsonl") == ["d/more/train-2.jsonl"]
    assert names("d", "test-0.jsonl") == ["d/test-0.jsonl"]


@pytest.mark.parametrize("other", ["test.jsonl", "validation/0.jsonl", "rows-dev-1.jsonl"])
def test_splits_are_not_read_as_one(other: str) -> None:
    """A folder with a training and another split needs `files`; one split alone does not."""
    make("d/train.jsonl")
    assert names("d") == ["d/train.jsonl"]
    make(f"d/{other}")
    with pytest.raises(FileFault, match="the folder holds several splits"):
        names("d")


def test_a_pattern_stands_for_the_files_it_matches() -> None:
    """In order of their names, relative or absolute, and never a folder."""
    make("d/b.jsonl", "d/a.jsonl", "d/c.csv", "d/e.jsonl/x")
    assert names("d/*.jsonl") == names(f"{Path.cwd()}/d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert names("**/[ac].*") == ["d/a.jsonl", "d/c.csv"]
    make("d/[a].jsonl")
    assert names("d/[a].jsonl") == ["d/[a].jsonl"]


def test_overlapping_patterns_would_count_rows_twice() -> None:
    """Each file may be named once, however it is named."""
    make("d/a.jsonl", "d/b.jsonl")
    with pytest.raises(DataError, match=r"d/a\.jsonl: the file is listed twice"):
        load(DataSettings(path=["d", "d/a*"]), Role.PROMPTS)


def test_a_data_set_of_the_hub_at_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the library's cache, as it lies there after a download: the commit's files, named by the data set."""
    cache = tmp_path / "cache"
    make(*(f"cache/datasets--org--pairs/snapshots/{COMMIT}/{name}" for name in ("base/train.jsonl", "base/test.jsonl")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    [row] = load(DataSettings(path=f"org/pairs@{COMMIT}", files="base/train.jsonl"), Role.PROMPTS).train
    assert row.source == "org/pairs/base/train.jsonl:1"
    with pytest.raises(DataError, match=r"org/pairs@.*: the folder holds several splits: test, train"):
        load(DataSettings(path=f"org/pairs@{COMMIT}"), Role.PROMPTS)
    with pytest.raises(DataError, match="the hub does not give it"):
        load(DataSettings(path=f"org/other@{COMMIT}"), Role.PROMPTS)


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0", f"@{COMMIT[:8]}"])
def test_a_data_set_of_the_hub_needs_a_whole_commit(revision: str) -> None:
    """A branch or a tag may move, and the run could not be repeated."""
    with pytest.raises(FileFault, match="must be pinned to a commit"):
        files_of(f"org/pairs-v0.2{revision}")


def test_what_is_no_file_is_refused_without_waiting_for_it() -> None:
    """A pipe would block for ever."""
    os.mkfifo("pipe.jsonl")
    with pytest.raises(FileFault, match="not a regular file"):
        list(read(Path("pipe.jsonl")))
    Path("link.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(DataError, match=r"link\.jsonl: there is no such file"):
        load(DataSettings(path="link.jsonl"), Role.PROMPTS)


def test_a_file_that_changes_while_it_is_read_is_refused() -> None:
    """Its rows may be of two versions, and its content hash of neither."""
    make("a.jsonl", content=LINE * 3)
    rows = read(Path("a.jsonl"))
    next(rows)
    make("a.jsonl", content=LINE * 4)
    with pytest.raises(FileFault, match="the file was changed while it was read"):
        list(rows)


def test_a_file_that_changes_between_the_two_passes_is_refused() -> None:
    """Its shape would be that of other rows."""
    make("a.jsonl")
    rows = FileRows(DataFile(Path("a.jsonl"), "a.jsonl"), ReadSettings(), Role.PROMPTS)
    assert len(list(rows)) == len(list(rows)) == 1
    make("a.jsonl", content=LINE * 2)
    with pytest.raises(FileFault, match="the file was changed while it was read"):
        list(rows)


def test_compressed_files_have_the_hash_of_their_text() -> None:
    """Packing a file changes nothing, so nothing is trained again; two members are one text."""
    make("a.jsonl", content=LINE * 2)
    make("a.jsonl.gz", content=gz(LINE) + gz(LINE))
    make("a.jsonl.zst", content=zst(LINE * 2))
    hashes = {content_hash(DataSettings(path=name)) for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst")}
    assert len(hashes) == 1


def test_a_fault_in_a_packed_file_is_told_by_its_line() -> None:
    """Lines and offsets are those of the text."""
    make("a.jsonl.gz", content=gz(LINE + b"\xff\n"))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:2: byte 0xff at offset 17 of the file is not UTF-8"):
        load(DataSettings(path="a.jsonl.gz"), Role.PROMPTS)


def test_bytes_are_closed_after_an_error() -> None:
    """A file that is not what its name says is not left open."""
    make("a.jsonl.gz")
    with pytest.raises(FileFault), opened(Path("a.jsonl.gz")):
        pass
    make("b.json", content=json.dumps([{"prompt": "Hi"}]).encode())
    assert len(load(DataSettings(path="b.json"), Role.PROMPTS).train) == 1
