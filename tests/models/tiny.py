"""A real model, small enough to make in a second: the `base` stage's own tokenizer and architecture."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from align.data.render import Renderer
from align.data.rows import Document
from align.demo import world
from align.job import Input
from align.models.lora import add_lora
from align.models.opened import Opened, commit_policy
from align.recipe.training_settings import LoraSettings
from align.records import committed_folder
from stages.base.config import Config
from stages.base.run import new_model, train_tokenizer

CONFIG = Config(vocabulary=300, context=64, hidden=32, layers=2, heads=2)
FOR_VLLM = CONFIG.model_copy(update={"hidden": 64})
"""On a CPU its attention wants heads of 32."""


def demo_texts(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Instructions of the demo world and imperfect answers, no instruction twice."""
    rng = random.Random(seed)
    texts: dict[str, str] = {}
    while len(texts) < count:
        task = world.draw_task(rng)
        texts.setdefault(task.instruction, world.draw_answer(task, rng))
    return list(texts.items())


def new_tokenizer() -> Any:
    """A byte-level BPE tokenizer with the demo's chat template, PAD and EOS of their own."""
    documents = [Document(f"{prompt} {answer}", "texts:1") for prompt, answer in demo_texts(60)]
    return train_tokenizer(documents, CONFIG.vocabulary, CONFIG.context)


def new_opened(seed: int = 0, config: Config = CONFIG) -> Opened:
    """A policy with random weights. Wider than a fresh initialisation, so that it is sure of something and every
    weight matters."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    model = new_model(config, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return Opened(model, tokenizer, Renderer(tokenizer))


def probes(renderer: Renderer, count: int = 8) -> list[list[int]]:
    """Whole conversations of the demo world as ids."""
    return [
        renderer.conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])[0]
        for prompt, answer in demo_texts(count, seed=2)
    ]


def save_policy(opened: Opened, folder: Path) -> Input:
    """Commits a policy as a stage does, and names it as a stage's input."""
    commit_policy(committed_folder(folder), opened.model, opened, probes(opened.renderer))
    return model_input(folder)


def trained_adapter(model: Any, *, is_reward: bool = False) -> Any:
    """A model with an adapter that has learnt something: B is no longer 0, a reward head has moved."""
    lora = add_lora(model, LoraSettings(rank=4, alpha=8), is_reward=is_reward)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    return lora.eval()


def model_input(folder: Path, kind: str = "policy", source: str = "start") -> Input:
    """A committed folder as a stage's input."""
    return Input(kind=kind, path=str(folder), fingerprint="0" * 64, source=source)


def save_foreign(folder: Path, pad: str | None) -> Path:
    """A model that align did not make: its tokenizer has no PAD, or EOS for one, and no embedding row to spare."""
    opened = new_opened()
    tokenizer: Any = opened.tokenizer
    rows = len(tokenizer) - 1  # "<|pad|>" gets a new id beyond these, as in GPT-2's folder
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary["added_tokens"] = [token for token in vocabulary["added_tokens"] if token["content"] != "<|pad|>"]
    ids = vocabulary["model"]["vocab"]
    del ids["<|pad|>"]
    vocabulary["model"]["vocab"] = {text: number - 1 for text, number in ids.items()}
    for token in vocabulary["added_tokens"]:
        token["id"] -= 1
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    special = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    opened.model.resize_token_embeddings(rows)
    opened.model.save_pretrained(folder)
    return folder


def drop_weight(folder: Path, name: str) -> None:
    """Damages a saved model."""
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
