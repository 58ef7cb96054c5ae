"""The hand-over check: what was saved is what was trained, and what is loaded is what was saved.

After a stage has saved its model, the folder is loaded afresh with plain `from_pretrained` and must give the same
log-probabilities (policy) or scores (reward model) on probe rows as the trained model, adapter and all, gave in
memory. The probe rows and their values travel with the model in `probes.json`; the next stage repeats the check on
what it has loaded, so a dropped adapter, a lost reward head or a re-initialised embedding stops the chain.

A model that is loaded in 4 bits is not what was saved, so its probes cannot say whether the folder still is. The sha256
of the files say that instead. The probes then measure what quantisation moved, and stop the chain where that can only
be lost weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from align.data.render import Renderer
from align.errors import ArtifactError
from align.models.load import OFFSET_FIELD, disable_dropout
from align.models.reward import score_sequences
from align.models.roles import reward_role
from align.records import fingerprint, read_manifest

PROBES_FILE = "probes.json"
NUM_PROBES = 8
BLOCK = 256
"""Tokens of a probe whose float32 logits exist at a time."""
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Largest difference allowed, in nats per sequence or in units of the score, by weight dtype. The same weights in the
same code differ by 0; a merged adapter is rounded once more, which over a sequence adds up to these."""
QUANTISED_BOUND = 0.5
"""Largest mean difference allowed between the probes of a policy in 4 bits and in full, in nats per token. NF4 moves
those of the demo's policies by 0.005 to 0.17; with shuffled weights they are off by 2.3 to 4.7."""


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> dict[str, Any]:
    """What must agree between the stages that meet at a model."""
    return {
        "vocabulary": fingerprint(tokenizer.get_vocab()),
        "chat_template": fingerprint(tokenizer.chat_template or ""),
        "pad_id": renderer.pad_id,
        "stop_ids": list(renderer.stop_ids),
    }


@torch.no_grad()
def probe_values(model: Any, probes: Sequence[Sequence[int]], *, is_reward: bool) -> list[float]:
    """One number per probe, computed without padding through the library's own forward: the score of a reward model,
    or the sum of the log-probabilities of all tokens after the first."""
    was_training = model.training
    model.eval()
    values = []
    for probe in probes:
        ids = torch.tensor([list(probe)], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        if is_reward:
            values.append(float(logits[0]) + getattr(model.config, OFFSET_FIELD, 0.0))
        else:
            values.append(_logprob(logits[:-1], ids[0, 1:]))
    model.train(was_training)
    return values


def _logprob(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Sum of the tokens' log-probabilities: logits (N,V), tokens (N,). In float32, a block at a time."""
    blocks = zip(logits.split(BLOCK), tokens.split(BLOCK), strict=True)
    return sum(float(block.float().log_softmax(-1).gather(-1, chosen[:, None]).sum()) for block, chosen in blocks)


def verify_saved(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    probes: Sequence[list[int]],
    expected: Sequence[float],
    *,
    dtype: torch.dtype,
    is_reward: bool,
) -> dict[str, Any]:
    """Loads a saved model with plain `from_pretrained` and compares its probe values with those of the trained model.

    Stores the probes in the folder and returns the result for the record. Raises ArtifactError when they differ by
    more than the bound.
    """
    auto_class = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    loaded = auto_class.from_pretrained(folder, dtype=dtype)
    disable_dropout(loaded)
    what = f"{folder.name}: the saved model, loaded afresh,"
    result: dict[str, Any] = {
        "probes": len(probes),
        "bound": BOUNDS[dtype],
        "largest_difference": _compare(
            probe_values(loaded, probes, is_reward=is_reward), expected, BOUNDS[dtype], what
        ),
        "tokenizer": tokenizer_identity(tokenizer, renderer),
    }
    if is_reward:  # our pooling by length, in one padded batch, against the library's
        with torch.no_grad():
            batched = score_sequences(reward_role(loaded.eval()), probes, renderer.pad_id).tolist()
        result["padded_difference"] = _compare(batched, expected, BOUNDS[dtype], f"{what} scored in a padded batch,")
    content = {
        "tokenizer": result["tokenizer"],
        "probes": [list(probe) for probe in probes],
        "values": list(expected),
        "bound": BOUNDS[dtype],
        "is_reward": is_reward,
    }
    (folder / PROBES_FILE).write_text(json.dumps(content), encoding="utf-8")
    return result


def verify_loaded(
    model: Any,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    source: str,
    *,
    quantised: bool = False,
) -> float | None:
    """Repeats the check on a model that a later stage has loaded. Returns the largest difference of a probe, None for
    a model that carries no probes (one that align did not make).

    With `quantised` (a policy) the files are compared with their sha256, and the result is the mean difference per
    token: what quantisation moved. Raises ArtifactError when the model is not what was saved.
    """
    path = Path(folder)
    stored = _stored(path)
    if stored is None:
        return None
    verify_tokenizer(tokenizer, renderer, path, source)
    values = partial(probe_values, model, is_reward=stored["is_reward"])
    if not quantised:
        return verify_values(values, path, model.dtype, source)
    read_manifest(path, hashes=True)
    return _moved(values(stored["probes"]), stored, f"{source}: {folder}")


def verify_tokenizer(tokenizer: PreTrainedTokenizerBase, renderer: Renderer, folder: Path, source: str) -> None:
    """Raises ArtifactError unless text becomes the tokens that it became when the model of a folder was saved."""
    stored, identity = _stored(folder), tokenizer_identity(tokenizer, renderer)
    for key, value in stored["tokenizer"].items() if stored else ():
        if identity[key] != value:
            raise ArtifactError(
                f"{source}: {folder}: the tokenizer's {key} is not what it was when the model was saved; "
                "was the folder edited, or does data.template differ between the stages?"
            )


def verify_values(
    values: Callable[[list[list[int]]], list[float]], folder: Path, dtype: torch.dtype, source: str
) -> float | None:
    """Compares what `values` gives for the probes of a folder with what was stored, within the wider bound of the two
    dtypes. Returns the largest difference, None for a folder without probes. Raises ArtifactError beyond the bound."""
    stored = _stored(folder)
    if stored is None:
        return None
    bound = max(stored.get("bound", 0.0), BOUNDS[dtype])
    return _compare(values(stored["probes"]), stored["values"], bound, f"{source}: {folder}: the loaded model")


def _stored(folder: Path) -> dict[str, Any] | None:
    path = folder / PROBES_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _compare(values: Sequence[float], expected: Sequence[float], bound: float, what: str) -> float:
    difference = max(abs(value - other) for value, other in zip(values, expected, strict=True))
    if not difference <= bound:
        raise ArtifactError(
            f"{what} differs from the model that was trained by {difference:.3g} on a probe row "
            f"(bound {bound:g}): weights were lost or changed on the way"
        )
    return difference


def _moved(values: Sequence[float], stored: dict[str, Any], what: str) -> float:
    """Mean difference, in nats per token after a probe's first. Raises ArtifactError beyond the bound."""
    total = sum(abs(value - other) for value, other in zip(values, stored["values"], strict=True))
    moved = total / sum(len(probe) - 1 for probe in stored["probes"])
    if not moved <= QUANTISED_BOUND:
        raise ArtifactError(
            f"{what}: in 4 bits the model differs from the one that was trained by {moved:.3g} nats per token (bound "
            f"{QUANTISED_BOUND:g}): weights were lost, or they cannot be held in 4 bits; train without lora.quantise"
        )
    return moved
