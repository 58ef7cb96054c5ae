"""Which files a path of the recipe names: a file, a folder, a pattern, or a data set on the hub at one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from align.data.faults import FileFault, escaped, quoted
from align.data.readers import READERS
from align.data.streams import data_format
from align.recipe.nearest import did_you_mean

HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>.*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
NOT_DATA = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")
"""What `datasets` writes beside the rows."""
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "eval": "evaluation"}


class DataFile(NamedTuple):
    """A file to read, and how messages name it."""

    path: Path
    name: str


def shown_path(path: Path) -> str:
    """The path as messages name it: relative to the working folder where that is shorter."""
    return min(os.path.relpath(path), str(path), key=len)


def files_of(path: str, pattern: str | None = None) -> list[DataFile]:
    """The data files that a path stands for, in order of their names; `pattern` chooses among those of a folder or of
    the hub. Raises FileFault when there is none, or when files of several splits would be read as one."""
    local = Path(path)
    if local.is_dir():
        return [DataFile(local / name, shown_path(local / name)) for name in _inside(local, pattern)]
    if has_magic(path) and not local.exists():
        return [DataFile(file, shown_path(file)) for file in _matching(path)]
    hub = HUB_ID.fullmatch(path)
    if hub and not local.exists() and data_format(local) not in READERS:
        folder = _downloaded(hub["name"], hub["revision"], pattern)
        return [DataFile(folder / name, f"{hub['name']}/{name}") for name in _inside(folder, pattern)]
    if pattern is not None:
        raise FileFault("`files` chooses among the files of a folder or of the hub, and this is neither", "remove it")
    if not local.exists():
        raise FileFault("there is no such file", _nearest(local))
    return [DataFile(local, shown_path(local))]


def _inside(folder: Path, pattern: str | None) -> list[str]:
    """Data files anywhere below a folder, relative to it."""
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        raise FileFault("this is the folder of a model, not of data")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_data(path, folder))
    chosen = [name for name in names if pattern is None or _matches(name, pattern)]
    if not chosen:
        what = (
            "there are no data files in the folder" if pattern is None else f"no data file matches {quoted([pattern])}"
        )
        raise FileFault(what, f"it has {quoted(names[:5])}" if names else f"align reads {quoted(list(READERS))}")
    splits = sorted({split for name in chosen for split in _splits(name)})
    if pattern is None and len(splits) > 1:
        raise FileFault(
            f"the folder holds several splits: {', '.join(splits)}",
            f"choose with `files`, for example `files: {escaped(chosen[0])}`",
        )
    return chosen


def _is_data(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    is_hidden = any(part.startswith(".") for part in parts)
    return data_format(path) in READERS and path.name not in NOT_DATA and not is_hidden and path.is_file()


def _matches(name: str, pattern: str) -> bool:
    """`*` stops at a slash, as in a shell; a folder stands for all that is below it."""
    parts, wanted = PurePosixPath(name).parts, PurePosixPath(pattern).parts
    starts = len(parts) >= len(wanted) and all(map(fnmatch, parts, wanted))
    return starts and (len(parts) == len(wanted) or not has_magic(wanted[-1]))


def _splits(name: str) -> Iterator[str]:
    """The splits that a file's name speaks of: train of data/train-00000-of-00001.parquet."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word in SPLITS:
            yield SPLITS[word]


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    found = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise FileFault("no file matches this pattern", _nearest(Path(pattern)))
    return files


def _downloaded(name: str, revision: str | None, pattern: str | None) -> Path:
    """The folder of a data set of the hub at one commit; only data files are fetched, and those that are here already
    are not fetched again."""
    if revision is None or not COMMIT.fullmatch(revision):
        raise FileFault(
            "a data set of the hub must be pinned to a commit, and there is no such file here",
            f"write `{name}@<40 hex digits>`",
        )
    from huggingface_hub import constants, snapshot_download  # here, because only hub ids pay for it

    endings = [f"*{suffix}{packed}" for suffix in READERS for packed in ("", ".gz", ".zst")]
    wanted = endings if pattern is None else [pattern, f"{pattern}/*"]
    only_local = constants.HF_HUB_OFFLINE
    try:
        folder = snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=wanted, local_files_only=only_local
        )
        return Path(folder)
    except Exception as error:  # of the network, the hub and the disk, in the library's many kinds
        reason = str(error).strip().partition("\n")[0]
        raise FileFault(f"the hub does not give it: {reason}", "check the name, the commit and HF_TOKEN") from error


def _nearest(path: Path) -> str:
    """What could have been meant by a file that is not there."""
    if not path.parent.is_dir():
        return f"there is no folder {escaped(shown_path(path.parent))}"
    names: Sequence[str] = sorted(entry.name for entry in path.parent.iterdir() if data_format(entry) in READERS)
    near = did_you_mean(path.name, map(escaped, names))
    return near or (f"its folder has {quoted(names[:5])}" if names else "its folder has no data files")
