"""Writing things so that they are whole or absent: canonical JSON, hashes, and the commit protocol.

Commit protocol of every artifact and checkpoint: write into `.tmp-<name>-<id>` beside the target, fsync every file,
write MANIFEST.json with the size and sha256 of each file, fsync the folders, rename. A folder without a manifest that
verifies does not exist for a reader; there is no pointer file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import ArtifactError, WriteError

MANIFEST = "MANIFEST.json"
MANIFEST_SCHEMA = 1


def canonical_json(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces, no NaN. Raises TypeError on anything that is not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes pretty JSON atomically: a reader sees the old file or the whole new one."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Writes text atomically and durably (temporary file, fsync, rename, fsync of the folder)."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes texts one after another, like `write_text`; all of them need not fit in memory."""
    with committed_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(lines)


@contextmanager
def committed_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside the target; what is written there appears as `path` in one step, durably, and on an
    error not at all. Writers at the same time: the last one wins. Raises WriteError when the disk refuses."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{path.parent}: cannot make the folder: {error.strerror or error}") from error
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except BaseException as error:  # of the disk, or of what is written
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(f"{path}: cannot write: {error.strerror or error}") from error
        raise


@contextmanager
def committed_folder(target: Path, **manifest: Any) -> Iterator[Path]:
    """Gives a staging folder; on a clean exit its content appears as `target` in one step, on an error not at all.

    `manifest` is stored in MANIFEST.json beside the list of files. Raises WriteError when the disk refuses.
    """
    staging = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
        yield staging
        files = {
            str(path.relative_to(staging)): {"size": path.stat().st_size, "sha256": _fsynced_sha256(path)}
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        write_json(staging / MANIFEST, {"schema": MANIFEST_SCHEMA, **manifest, "files": files})
        for folder in [path for path in staging.rglob("*") if path.is_dir()] + [staging]:
            _fsync_folder(folder)
        if target.exists():
            remove_folder(target)
        staging.rename(target)
        _fsync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise WriteError(f"{target}: cannot write: {error.strerror or error}") from error
        raise


def remove_folder(folder: Path) -> None:
    """Removes a folder so that a crash half-way leaves only `.trash-*`, never a half-made artifact."""
    trash = folder.with_name(f".trash-{folder.name}-{uuid.uuid4().hex[:8]}")
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path, name: str = "") -> list[Path]:
    """Removes what an interrupted commit or deletion left in `folder`, of the target `name` or of any; returns what was
    removed."""
    left = [*folder.glob(f".tmp-{name}*"), *folder.glob(f".trash-{name}*")]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return left


def read_manifest(folder: Path, *, hashes: bool = False) -> dict[str, Any]:
    """The manifest of a committed folder, after checking sizes (and sha256 when `hashes`).

    Raises ArtifactError naming the first file that is missing, cut short or changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(facts["size"]), str(facts["sha256"])) for name, facts in manifest["files"].items()}
        schema = int(manifest["schema"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder}: not a complete artifact: {MANIFEST} is missing or unreadable") from error
    if schema > MANIFEST_SCHEMA:
        raise ArtifactError(f"{folder}: written by a newer align (manifest schema {schema}); update align")
    for name, (expected_size, expected_hash) in files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise ArtifactError(f"{folder}: {name} is listed in {MANIFEST} but missing")
        size = path.stat().st_size
        if size != expected_size:
            raise ArtifactError(f"{path}: {size} bytes, the manifest says {expected_size}: the file was cut or edited")
        if hashes and sha256_file(path) != expected_hash:
            raise ArtifactError(
                f"{path}: content differs from the manifest's sha256: the file is damaged or was edited"
            )
    return manifest


def _fsynced_sha256(path: Path) -> str:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    return sha256_file(path)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
