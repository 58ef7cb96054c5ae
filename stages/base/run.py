"""Makes a small language model and its tokenizer from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset as RowDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from align.context import Context
from align.data.render import PAD_TOKEN, Renderer
from align.data.rows import Document
from align.evaluation.stage import evaluate_model, held_out_prompts
from align.job import StageResult
from align.models.handover import NUM_PROBES
from align.models.opened import Opened, commit_policy
from align.recipe.data_settings import Role
from align.recipe.engine_settings import EvaluationSettings
from align.training.rows import load_rows
from align.training.sharding import sharding_arguments
from align.training.trainer import CommittedTrainer, housekeeping_arguments, optimiser_arguments, run_training
from stages.base.config import KEPT_CHECKPOINTS, Config

END = "<|end|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('this template knows the roles system, user and assistant') }}"
    "{%- endif -%}"
    "<|{{ message['role'] }}|>"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{%- else -%}{{ message['content'] }}<|end|>{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


class PretrainingTrainer(CommittedTrainer, Trainer):
    """The library's trainer with our checkpoints and guards."""


def run(config: Config, context: Context) -> StageResult:
    """Tokenizer, random weights, next-token training, commit, measurement."""
    set_seed(context.seed("weights"))
    assert config.data is not None
    documents = load_rows(config.data, Role.CORPUS, context)
    tokenizer = train_tokenizer(documents.train, config.vocabulary, config.context)
    opened = Opened(new_model(config, tokenizer), tokenizer, Renderer(tokenizer, "chat"))
    blocks = packed(tokenizer, documents.train, config.sequence_length)
    if config.steps:
        _train(config, context, opened, blocks)
    model, handover = commit_policy(context.commit_model(), opened.model, opened, blocks[:NUM_PROBES])
    evaluation = EvaluationSettings.model_validate(context.job.evaluation)
    prompts = held_out_prompts(evaluation, ())
    metrics = evaluate_model(context, evaluation, model, context.model_directory, opened.renderer, prompts)
    return StageResult({"parameters": model.num_parameters(), **metrics}, handover)


def train_tokenizer(documents: Sequence[Document], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al. 2016, on bytes): every text can be encoded, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [PAD_TOKEN, END, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END,
        additional_special_tokens=specials[2:],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama-shaped model with random weights, embeddings tied."""
    ids = tokenizer.get_vocab()
    own = {"vocab_size": config.embeddings or len(tokenizer), "pad_token_id": ids[PAD_TOKEN], "eos_token_id": ids[END]}
    settings = {name: value for name, value in config.architecture().items() if name != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **own}, bos_token_id=None))


def packed(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], length: int) -> list[list[int]]:
    """All documents end to end, each closed by EOS, cut into blocks of `length` tokens; a short rest is left out
    unless it is all there is."""
    stream: list[int] = []
    for document in documents:
        stream += [*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]
    blocks = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    return blocks or [stream]


def _train(config: Config, context: Context, opened: Opened, blocks: list[list[int]]) -> None:
    each = config.batch_size // context.processes
    arguments = TrainingArguments(
        **housekeeping_arguments(context),
        **optimiser_arguments(config.optim),
        **sharding_arguments(each, 1, config.optim.max_grad_norm, in_bfloat16=False),
        max_steps=config.steps,
        per_device_train_batch_size=each,
        logging_steps=config.log_every,
        save_steps=max(1, config.steps // 4),
    )
    trainer = PretrainingTrainer(
        model=opened.model,
        args=arguments,
        train_dataset=RowDataset.from_dict({"input_ids": blocks}),
        data_collator=_collate,
    )
    run_training(trainer, context, keep_checkpoints=KEPT_CHECKPOINTS, shown={"loss": "loss"})


def _collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}
