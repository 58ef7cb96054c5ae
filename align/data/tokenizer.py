"""Loading a tokenizer, the same for training and for `align data`. The library is imported when one is loaded."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from align.data.render import PAD_TOKEN, Renderer
from align.errors import ArtifactError
from align.records import fingerprint, sha256_file


def tokenizer_of(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model's folder, with a PAD token of its own.

    PAD must differ from EOS: sequence classification pools at the last token that is not PAD, and collators mask PAD.
    A new PAD needs no embedding row that is ever read, because masks come from lengths.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """One hash of all that a tokenizer and its chat template are; not of where they lie."""
    with TemporaryDirectory(prefix="align-") as folder:
        files = [Path(name) for name in tokenizer.save_pretrained(folder)]
        return fingerprint({path.name: sha256_file(path) for path in files if path.is_file()})


def renderer_of(folder: Path) -> Renderer:
    """What renders rows for the model in a local folder. Raises ArtifactError."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; --tokenizer wants the folder of a model")
    try:
        return Renderer(tokenizer_of(str(folder)))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{folder}: cannot load its tokenizer: {reason}") from error
