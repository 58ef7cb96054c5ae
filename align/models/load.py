"""Loading models and tokenizers. A weight that is missing from the folder is an error, never silently random.

Models are `PreTrainedModel`s of classes chosen by their config; they are typed `Any`, because a head such as `score`
is known to the class only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from align.data.tokenizer import tokenizer_of
from align.errors import ArtifactError
from align.job import Input
from align.models.partitioned import whole

OFFSET_FIELD = "reward_offset"
"""Name in config.json of what is added to the head's output; see align.models.reward."""
HIGHEST_FIELD = "reward_highest_in_training"
"""Name in config.json of the highest normalised score of a chosen response that the reward model was trained on."""


def local_folder(source: Input) -> str:
    """The folder of an input, downloading a hub id at its pinned revision (safetensors and text files only)."""
    if (Path(source.path) / "adapter_config.json").is_file():
        raise ArtifactError(
            f"{source.source}: {source.path} is an adapter, not a whole model; name the merged model's folder "
            "(align keeps an adapter inside it)"
        )
    if Path(source.path).is_dir():
        return source.path
    return snapshot_download(
        source.path,
        revision=source.revision,
        allow_patterns=[
            "*.json",
            "*.safetensors",
            "*.txt",
            "*.model",
            "*.jinja",
            *(["*.py"] if source.trust_remote_code else []),
        ],
    )


def load_tokenizer(source: Input) -> PreTrainedTokenizerBase:
    """The tokenizer of an input, with a PAD token of its own."""
    with _explained(source):
        return tokenizer_of(local_folder(source), trust_remote_code=source.trust_remote_code)


def load_policy(
    source: Input, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, quantise: str | None = None
) -> Any:
    """A causal language model, dropout off, its embeddings covering the tokenizer. With `quantise` its linear layers
    are held in NF4, frozen (align.models.quantised); `dtype` is then that of all the rest."""
    return _load(AutoModelForCausalLM, source, tokenizer, dtype, quantise)


def load_reward(
    source: Input, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, quantise: str | None = None
) -> Any:
    """A reward model (sequence classification, one label), dropout off. Its head must be in the folder."""
    return _load(AutoModelForSequenceClassification, source, tokenizer, dtype, quantise, num_labels=1)


def new_reward(
    source: Input, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, quantise: str | None = None
) -> Any:
    """A reward model on a policy's backbone, with a new head drawn from N(0, 1/(d+1)) (Ziegler et al. 2019; the
    variance, so the standard deviation is 1/sqrt(d+1))."""
    model = _load(AutoModelForSequenceClassification, source, tokenizer, dtype, quantise, new_head=True, num_labels=1)
    head = model.score.weight
    with whole([head], writer=0):
        torch.nn.init.normal_(head, std=(head.shape[1] + 1) ** -0.5)
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout to 0, in train mode too: the ratio of new to old policy must be 1 at the first step."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # attention layers keep theirs as a number
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _load(
    auto_class: Any,
    source: Input,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    quantise: str | None,
    *,
    new_head: bool = False,
    **config: Any,
) -> Any:
    if quantise:
        from align.models.quantised import adopt_nf4, nf4_config  # needs bitsandbytes, which is optional

        config["quantization_config"] = nf4_config()
    with _explained(source):
        folder = local_folder(source)
        model, report = auto_class.from_pretrained(
            folder,
            dtype=torch.float32 if quantise else dtype,
            use_safetensors=True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            **config,
        )
    missing = {key for key in report["missing_keys"] if not (new_head and key.startswith("score."))}
    if missing or report["mismatched_keys"]:
        names = ", ".join(sorted(missing)[:5]) or str(report["mismatched_keys"][:5])
        raise ArtifactError(
            f"{source.source}: {folder} does not hold all weights of a {type(model).__name__}: {names}; "
            "they would be random. Is it the right kind of model?"
        )
    if auto_class is AutoModelForCausalLM and "score.weight" in report["unexpected_keys"]:
        raise ArtifactError(f"{source.source}: {folder} is a reward model (it has a head `score`), not a policy")
    if quantise:
        adopt_nf4(model, dtype)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        _grow_embeddings(model, len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    disable_dropout(model)
    return model


def _grow_embeddings(model: Any, size: int) -> None:
    """Adds rows for new tokens, each the mean of the old ones. The library draws them at random, and two loads of
    the same model (policy and frozen reference) would differ."""
    old = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size, mean_resizing=False)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    with torch.no_grad():
        for layer in layers:
            with whole([layer.weight], writer=0):
                layer.weight[old:] = layer.weight[:old].mean(0)


@contextmanager
def _explained(source: Input) -> Iterator[None]:
    """Turns what the libraries raise on a broken or absent folder into one line that names it."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{source.source}: cannot load {source.path}: {reason}") from error
