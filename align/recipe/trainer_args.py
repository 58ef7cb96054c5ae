"""`trainer_args`: the arguments of TRL and transformers that align does not model, checked by name.

The names are read from the source of the installed libraries, because importing them takes seconds and loads
torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from align.errors import Problem
from align.recipe.nearest import did_you_mean
from align.recipe.overrides import Origins
from align.recipe.schema import KeyPath

RESERVED = {
    "optim": "optim.kind",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "micro_batch_size",
    "auto_find_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "max_length": "max_length",
    "truncation_mode": "on_long",
    "bf16": "precision",
    "fp16": "precision",
    "tf32": "tf32",
    "gradient_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "save_strategy": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "save_only_model": "checkpoint.every_steps",
    "logging_strategy": "log_every",
    "logging_steps": "log_every",
    "beta": "beta",
    "loss_type": "loss",
    "label_smoothing": "label_smoothing",
    "precompute_ref_log_probs": "precompute_reference",
    "precompute_ref_batch_size": "precompute_reference",
    "center_rewards_coefficient": "center",
    "seed": "seed",
    "data_seed": "seed",
    "report_to": "track",
    "run_name": "name",
    "trust_remote_code": "model.trust_remote_code",
}
"""Arguments that align sets itself, and the setting of align to use instead."""

_MANAGED = {
    "output_dir": "align chooses the stage's folder",
    "resume_from_checkpoint": "align resumes an interrupted stage by itself",
    "restore_callback_states_from_checkpoint": "align resumes an interrupted stage by itself",
    "ignore_data_skip": "a resumed stage continues where it was",
    "enable_jit_checkpoint": "align saves when it is interrupted",
    "load_best_model_at_end": "the last step is the result",
    "remove_unused_columns": "align gives the trainer exactly the columns it needs",
    "push_to_hub": "align writes local folders; upload a finished one with `hf upload`",
    "hub_token": "secrets come from the environment: HF_TOKEN",
    "hub_model_id": "align writes local folders; upload a finished one with `hf upload`",
    "eos_token": "the end token comes with the model and its chat template",
    "pad_token": "align keeps a padding token distinct from the end token",
    "chat_template_path": "the chat template comes with the model",
    "model_init_kwargs": "align loads the model",
    "dataset_text_field": "align prepares the rows; `data.columns` maps a private file",
    "dataset_kwargs": "align prepares the rows",
    "completion_only_loss": "only the assistant's tokens are trained on",
    "assistant_only_loss": "only the assistant's tokens are trained on",
    "loss_weights": "`sft_weight` adds the likelihood of chosen answers; losses are not mixed otherwise",
    "f_divergence_type": "align computes the loss, with the reverse KL",
    "f_alpha_divergence_coef": "align computes the loss, with the reverse KL",
    "ld_alpha": "align computes the loss, of all tokens of an answer alike",
    "use_weighting": "align computes the loss, of all pairs alike",
    "discopop_tau": "align computes the loss; discopop is not one of them",
    "sync_ref_model": "the reference stays the policy that the stage starts from",
    "ref_model_mixup_alpha": "the reference stays the policy that the stage starts from",
    "ref_model_sync_steps": "the reference stays the policy that the stage starts from",
    "do_train": "running the stage is what trains",
    "do_eval": "align measures at the end of the stage",
    "do_predict": "align measures at the end of the stage",
    "use_cpu": "align uses a GPU where there is one",
    "local_rank": "the launcher sets it",
    "ddp_timeout": "use `launch.timeout`",
    "average_tokens_across_devices": "a sum over tokens is divided once, by all tokens of the step",
    "dataloader_drop_last": "no row is left out",
    "deepspeed": "use `launch`",
    "fsdp": "use `launch`",
    "fsdp_config": "use `launch`",
}
"""Arguments that align sets itself and that no setting changes, and why."""

_LAZY = {("transformers", "TrainingArguments"): "transformers.training_args"}
"""Classes that a package's __init__ loads by name only."""


def check_trainer_args(names: Iterable[str], trainer_config: str, path: KeyPath, origins: Origins) -> list[Problem]:
    """The problems of the `trainer_args` at `path`; `trainer_config` is `package.module:Class`."""
    reasons = ((name, _reason(name, trainer_config)) for name in names)
    return [origins.problem((*path, name), *reason) for name, reason in reasons if reason]


def _reason(name: str, trainer_config: str) -> tuple[str, str] | None:
    if name in RESERVED:
        return "align sets this itself", f"use `{RESERVED[name]}`"
    if name in _MANAGED:
        return "align sets this itself", _MANAGED[name]
    module, _, class_name = trainer_config.partition(":")
    known = config_fields(module, class_name)
    if name in known:
        return None
    free = sorted(known - RESERVED.keys() - _MANAGED.keys())
    hint = did_you_mean(name, free)
    return f"{class_name} has no such argument", hint if hint.startswith("did") else f"see TRL's {class_name}"


@cache
def config_fields(module: str, class_name: str) -> frozenset[str]:
    """The annotated fields of a class and its bases, read from source without importing anything."""
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    definition = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    own = {
        node.target.id
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    bases = (base.id for base in definition.bases if isinstance(base, ast.Name))
    inherited = (config_fields(home, base) for base in bases for home in _homes(tree, module, base))
    return frozenset(own).union(*inherited)


def _homes(tree: ast.Module, module: str, name: str) -> Iterator[str]:
    """The module that `name` is imported from, if it is imported."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            home = ".".join(filter(None, (package, node.module)))
            yield _LAZY.get((home, name), home)


def _source(module: str) -> Path:
    """The file of a module. Only the top-level package is looked up: looking deeper would import it."""
    package, *inside = module.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed", name=package)
    return Path(spec.submodule_search_locations[0], *inside).with_suffix(".py")
