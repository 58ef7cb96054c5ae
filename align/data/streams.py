"""The bytes of a data file, decompressed, as a stream: a file need not fit in memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from align.data.faults import FileFault

MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
"""How compressed files begin, by the ending of their names."""

MAX_RATIO = 1000
UNCHECKED = 100 * 2**20
"""A compressed file may not become more than MAX_RATIO times its size, once it is over UNCHECKED bytes."""


def compression(path: Path) -> str:
    """`.gz`, `.zst` or nothing."""
    suffix = path.suffix.lower()
    return suffix if suffix in MAGIC else ""


def data_format(path: Path) -> str:
    """The suffix that names the format: `.jsonl` of a.jsonl and of a.jsonl.gz."""
    return (path.with_suffix("") if compression(path) else path).suffix.lower()


Version = tuple[int, int, int]


def version(path: Path) -> Version:
    """What is different once a file was written to: size, time and number of the file."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def refuse_change(path: Path, before: Version) -> None:
    """Raises FileFault if the file was written to since it had the version `before`."""
    if version(path) != before:
        raise FileFault("the file was changed while it was read", "run again when nothing writes to it")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file. Raises FileFault: it is missing, damaged, not what its name says, or changes
    while it is read."""
    if path.is_dir():
        raise FileFault("this is a folder, not a file")
    if path.exists() and not path.is_file():
        raise FileFault("this is not a regular file")
    try:
        with path.open("rb") as raw:
            before = version(path)
            with _decompressed(path, raw) as stream:
                yield stream
            refuse_change(path, before)
    except FileNotFoundError:
        raise FileFault("there is no such file") from None
    except OSError as error:
        raise FileFault(f"the file cannot be read: {error.strerror or error}") from None


@contextmanager
def _decompressed(path: Path, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    start = raw.read(4)
    raw.seek(0)
    named = compression(path)
    found = next((suffix for suffix, magic in MAGIC.items() if start.startswith(magic)), "")
    if named and start and found != named:
        raise FileFault(f"the name ends in `{named}`, but the file is not compressed that way", "rename it")
    if found and not named:
        raise FileFault(f"the file is compressed ({found[1:]})", f"rename it to {path.name}{found}")
    if not named:
        yield raw
        return
    limit = max(UNCHECKED, MAX_RATIO * path.stat().st_size)
    with io.BufferedReader(_Unpacked(_unpacker(raw, named), limit), 2**16) as stream:
        yield stream


def _unpacker(raw: IO[bytes], suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    # Imported here: it costs more than the rest of `align plan`, and most data is not compressed this way.
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


class _Unpacked(io.RawIOBase):
    """What an unpacker gives, up to a number of bytes that no honest file has. Raises FileFault."""

    def __init__(self, unpacker: Any, limit: int):
        self._unpacker = unpacker
        self._limit = limit
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._unpacker.read(len(buffer))
        except (EOFError, zlib.error, OSError) as error:
            what = f"the compressed data is damaged or cut after {self._done} bytes of text: {error}"
            raise FileFault(what, "export or copy it again") from None
        self._done += len(data)
        if self._done > self._limit:
            what = f"the file unpacks to over {self._limit} bytes, over {MAX_RATIO} times its size"
            raise FileFault(what, "unpack it yourself if that is right")
        buffer[: len(data)] = data
        return len(data)
