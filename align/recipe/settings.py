"""Settings shared by the stages. The docstring under each field is its documentation (`align show STAGE`).

Fields marked `execution` cannot change the result (logging cadence, number of checkpoints kept); they are
left out of a stage's fingerprint, so changing one never re-runs anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

REFUSED = "refused"
"""Type of the errors of `refuse`."""

REQUIRED = "required, and not given"


class Settings(BaseModel):
    """Base of every settings class: frozen, no unknown keys, no NaN, docstrings are the documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    def sources(self, slot: str) -> dict[str, str | None]:
        """Inputs of a slot by name, and what the recipe says each comes from; None where it says nothing. A slot is
        one input of its own name, unless a stage takes several (PPO's reward)."""
        return {slot: getattr(self, slot, None)}


def execution(default: Any, *, file: bool = False, **constraints: Any) -> Any:
    """A field that cannot change the result: left out of the fingerprint. `file`: it is a local path."""
    return Field(default, json_schema_extra={"execution": True, "file": file}, **constraints)


def source(default: Any = None) -> Any:
    """A field that names a model: what identifies it in the fingerprint is the model, not the name."""
    return Field(default, json_schema_extra={"source": True})


def function(default: Any = None) -> Any:
    """A field that names a Python function, `module:function`: the fingerprint holds the hash of its source."""
    return Field(default, json_schema_extra={"function": True})


def is_marked(field: FieldInfo, mark: str) -> bool:
    """Whether a field was made by the function called `mark` (execution, source or function), or names a `file`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))


def refuse(problems: Mapping[str, str]) -> None:
    """For validators of settings that must go together: raises what is wrong by dotted key, so that each problem is
    told with its own key and line. Does nothing when there is none.
    """
    if problems:
        errors = [
            InitErrorDetails(
                type=PydanticCustomError(REFUSED, "{what}", {"what": what}), loc=tuple(key.split(".")), input=None
            )
            for key, what in problems.items()
        ]
        raise ValidationError.from_exception_data("settings", errors)


def shorthand(key: str) -> BeforeValidator:
    """Lets a bare string (or list) stand for a mapping: `data: a.jsonl` is `data: {path: a.jsonl}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str | list) else value)


Fraction = Annotated[float, Field(ge=0, le=1)]


class Role(StrEnum):
    """What a stage reads its data file as."""

    CORPUS = "corpus"
    DEMONSTRATIONS = "demonstrations"
    PREFERENCES = "preferences"
    JUDGEMENTS = "judgements"
    PROMPTS = "prompts"


PairRule = Literal["extremes", "best", "all"]
"""Which pairs are made of scored answers: align.data.pairs."""


DATA_PLACES = frozenset({"path", "held_out_path", "decontaminate"})
"""Settings of data that say where files lie."""


class ReadSettings(Settings):
    """Files, and how their rows are read."""

    path: str | list[str] | None = None
    """A .jsonl, .json, .csv, .parquet or .arrow file (the first three also .gz or .zst), a folder, a pattern such as
    `parts/*.jsonl`, a data set of the hub such as `org/name@<commit>`, or a list of them. Relative to the recipe's
    folder. Required, unless there is a `mixture`."""

    files: str | None = None
    """Which files of a folder or of a data set of the hub: a name, a folder inside it or a pattern with `*`. None: all
    its data files, if they are not of several splits."""

    columns: dict[str, str] = {}
    """Mapping for private files, `{our name: their column}`. Our names are the columns of the shapes in docs/data.md,
    and `messages.role` and `messages.content` for the keys of a message. A dot goes into an object: `question.text`.
    Empty: the shape is detected from the columns."""

    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = {}
    """Mapping for the roles of a private file's messages, `{their role: our role}`."""

    score: str | None = None
    """Which score decides, in files with several: UltraFeedback, HelpSteer2, PKU-SafeRLHF. None: the first in
    docs/data.md."""

    pairs: PairRule = "extremes"
    """Which pairs are made of answers with scores or ranks. extremes: the best against the worst. best: the best
    against each other one. all: every two. Pairs with equal scores are left out and counted."""

    system: str | None = None
    """System message put before every prompt that has none."""


class SourceSettings(ReadSettings):
    """One part of a mixture."""

    weight: PositiveFloat | None = None
    """Its share of the mixture, in relation to the weights of the others. All parts have a weight, or none has."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of its rows that are used, chosen by their prompts. Not together with weights."""

    @model_validator(mode="after")
    def _has_path(self) -> SourceSettings:
        refuse({} if self.path is not None else {"path": REQUIRED})
        return self


class DataSettings(ReadSettings):
    """Where rows come from and how they are read."""

    mixture: dict[str, Annotated[SourceSettings, shorthand("path")]] = {}
    """Several sources instead of `path`, `{name: {path: ..., weight: 2}}`, each with its own columns. With weights: as
    many rows as there are in these proportions without repeating one. Without: all, or the `fraction` of each."""

    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of prompts kept out of training for the final metrics. The split is by prompt, so no prompt is on
    both sides, and depends only on the prompt's text: stages that share prompts share the split."""

    held_out_path: str | list[str] | None = None
    """A separate file of held-out rows, read like `path`; `held_out` is then ignored."""

    decontaminate: str | list[str] | None = None
    """Evaluation sets, named like `path`. Rows whose prompt is in one, or shares 13 words in a row with one there, are
    left out and counted."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: prompts are rendered with the model's chat template. plain: prompt text followed directly by the
    response. auto: chat if the model has a chat template, else plain."""

    max_rows: PositiveInt | None = None
    """Use only the first rows of the files (after checking them). Those of a mixture have its proportions too."""

    on_bad: Literal["error", "skip"] = "error"
    """What to do with a malformed row: stop and name it, or leave it out, count it and write it to
    rejected.jsonl."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if not self.mixture:
            refuse({} if self.path is not None else {"path": REQUIRED})
            return self
        problems = {} if self.path is None else {"path": "with `mixture`, the files are named inside it"}
        problems |= {
            name: "with `mixture`, this is set in each of its parts"
            for name, field in ReadSettings.model_fields.items()
            if name != "path" and getattr(self, name) != field.default and self.held_out_path is None
        }
        weighted = [name for name, part in self.mixture.items() if part.weight is not None]
        for name, part in self.mixture.items():
            if weighted and part.weight is None:
                problems[f"mixture.{name}"] = f"has no `weight`, and {weighted[0]} has one"
            elif weighted and part.fraction != 1:
                problems[f"mixture.{name}.fraction"] = "the weights say how many rows are used; remove one of them"
        refuse(problems)
        return self

    def parts(self) -> dict[str, SourceSettings]:
        """The sources by name; a path alone is one source without a name."""
        if self.mixture:
            return self.mixture
        return {"": SourceSettings(**{name: getattr(self, name) for name in ReadSettings.model_fields})}


Data = Annotated[DataSettings, shorthand("path")]


class ModelSettings(Settings):
    """A model that align did not train: a local folder or a hub id."""

    path: str
    """A local Hugging Face folder, or a hub id such as `Qwen/Qwen2.5-0.5B`. `id@revision` is accepted."""

    revision: str | None = None
    """Commit of a hub id (40 hex digits). Required for hub ids, so that the run can be repeated."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    @model_validator(mode="before")
    @classmethod
    def _split_revision(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("path"), str) and "revision" not in value:
            path, _, revision = value["path"].partition("@")
            if revision and not path.startswith("/"):  # a folder's name may hold an @
                return {**value, "path": path, "revision": revision}
        return value


Model = Annotated[ModelSettings, shorthand("path")]


class OptimSettings(Settings):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat
    """Peak learning rate."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up. linear and cosine end at 0."""

    warmup: Fraction = 0.0
    """Share of all steps over which the learning rate rises from 0."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW moments."""

    eps: PositiveFloat = 1e-8
    """AdamW epsilon."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW decoupled weight decay."""

    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm, measured over all processes."""


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021). The saved model is the effective one: adapter merged into its
    base."""

    rank: PositiveInt = 16
    """Rank of each update."""

    alpha: PositiveFloat = 32.0
    """Updates are scaled by alpha / rank."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""

    target_modules: str | list[str] = "all-linear"
    """Which linear layers get an adapter."""

    quantise: Literal["nf4"] | None = None
    """nf4: the frozen base is held in 4 bits (QLoRA, Dettmers et al. 2023; needs bitsandbytes). The saved model is what
    was trained: the base as its 4 bits decode, plus the adapter."""


class CheckpointSettings(Settings):
    """Checkpoints inside a stage, from which an interrupted stage resumes."""

    every_steps: PositiveInt | None = execution(None)
    """Optimiser steps (PPO: rollouts) between checkpoints. None: a tenth of the stage."""

    keep: Annotated[int, Field(ge=1)] = execution(2)
    """How many are kept. All are removed once the stage's artifact is committed."""


class EngineSettings(Settings):
    """What generates responses."""

    engine: Literal["auto", "vllm", "vllm-server", "transformers"] = "auto"
    """vllm: vLLM in the stage's own process, on the policy's weights. vllm-server: vLLM in processes of its own, that
    are started again when they die. transformers: its generation, which needs nothing more. auto: vllm where it is
    installed and can run the model, else transformers; the stage says which."""

    max_sequences: PositiveInt = execution(256)
    """Responses that vLLM works on at a time."""

    kv_cache_bytes: PositiveInt | None = execution(None)
    """Memory for vLLM's cache of keys and values. None: on a CPU what `max_sequences` of the longest need, on a GPU
    what `gpu_memory` leaves."""

    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = execution(0.3)
    """Share of the GPU's memory that vLLM may use: its weights, where they are not shared, and its cache."""

    sleep: Literal["auto", "none", "cache", "all"] = execution("auto")
    """vllm, on a GPU: what it gives up of that while the policy is trained. cache: the cache of keys and values. all:
    also its weights, which is impossible where they are shared with the policy. auto: all where no weight is shared,
    else cache; on a CPU, where vLLM cannot, none."""

    address: str | None = execution(None)
    """vllm-server: URL of a server that runs already; its key is read from VLLM_API_KEY. None: one is started on this
    machine, open to it alone, and ended with the stage."""

    server_gpu: Annotated[int, Field(ge=0)] | None = execution(None)
    """vllm-server: GPU that a server of the stage's own runs on, by its number among those that the stage sees. None:
    the first, which is the policy's too."""

    transport: Literal["auto", "memory", "ipc", "nccl"] = execution("auto")
    """vllm-server: how weights get there. memory: through memory of the machine, from any device to any. ipc: through
    the memory of the GPU that policy and server are both on. nccl: from GPU to GPU. auto: ipc on one GPU, nccl between
    GPUs, else memory; the stage says which."""

    timeout: PositiveFloat = execution(600.0)
    """Seconds without a response (vllm-server) or a step (vllm) after which the engine counts as hanging. A server is
    started again; an engine in the stage's process ends it."""

    max_restarts: Annotated[int, Field(ge=0)] = execution(3)
    """How often in a row vLLM is started again when it fails, with the current policy, before the stage gives up."""


class EvaluationSettings(EngineSettings):
    """How policies are measured at the end of their stage, on held-out prompts."""

    gold: str | None = function()
    """`module:function` of a gold scorer `(prompts, responses) -> list of floats in 0..1` that no stage
    trains on."""

    data: Data | None = None
    """Prompts that every stage is measured on and none may train on. None: each stage's own held-out
    prompts."""

    prompts: PositiveInt = 256
    """Held-out prompts sampled from. Fewer are used when the held-out split has fewer."""

    max_response_tokens: PositiveInt = 256
    """Longest response sampled."""

    batch_size: PositiveInt = 64
    """Prompts sampled at a time."""

    engine: Literal["auto", "vllm", "vllm-server", "transformers"] = execution("transformers")
    """What samples, as rollout.engine; vLLM takes half a minute to start. ppo, rloo and grpo sample with their rollout
    engine, which is open already."""


class LaunchSettings(Settings):
    """The processes that a stage trains on, and how they share the work. How many there are changes nothing but the
    order in which sums are rounded."""

    processes: PositiveInt = 1
    """Processes in all, over all machines: one for each GPU. Rows of a batch are divided among them."""

    strategy: Literal["ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "zero3-nvme"] = "ddp"
    """ddp: each holds everything. zero1: a share of the optimiser's state; zero2: and of the gradients; zero3: and of
    the weights (DeepSpeed). offload: the shares are in main memory; nvme: on a disk. Files of `deepspeed/`."""

    config: str | None = execution(None, file=True)
    """A file of `accelerate config` to start with, instead of `processes` and `strategy`."""

    timeout: PositiveFloat = 1800.0
    """Seconds that a process waits for another one before the stage fails: more than saving the model takes."""

    @model_validator(mode="after")
    def _one_way(self) -> LaunchSettings:
        if self.config is not None and (self.processes, self.strategy) != (1, "ddp"):
            raise ValueError("config says how many processes there are and their strategy; leave both out here")
        return self

    @property
    def is_direct(self) -> bool:
        """Whether the stage is one process that needs no launcher."""
        return self.processes == 1 and self.strategy == "ddp" and self.config is None


class NodesSettings(Settings):
    """The machines of a run. The same command is given on each of them, in a folder that they share."""

    count: PositiveInt = 1
    """Machines."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Number of this machine; 0 writes everything."""

    address: str | None = None
    """Host name or address of machine 0, as the others reach it. Required for several machines."""

    port: Annotated[int, Field(ge=1, le=65535)] = 29500
    """The first of as many free ports of machine 0 as there are stages."""

    @model_validator(mode="after")
    def _agree(self) -> NodesSettings:
        if self.rank >= self.count:
            refuse({"rank": f"{self.rank} of {self.count} machines: they are numbered from 0"})
        if self.count > 1 and self.address is None:
            refuse({"address": f"required for {self.count} machines: where the others find machine 0"})
        return self


class TrainingSettings(Settings):
    """What every gradient-trained stage on TRL has in common."""

    epochs: PositiveFloat = 1.0
    """Passes over the training rows."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimiser steps, whatever `epochs` says."""

    batch_size: PositiveInt = 32
    """Rows (pairs, for preference stages) per optimiser step, over all processes."""

    micro_batch_size: PositiveInt | None = None
    """Rows per forward pass and process; smaller uses less memory. None: the whole batch at once."""

    max_length: PositiveInt = 1024
    """Longest sequence in tokens, prompt and response together. Longer rows follow `on_long`."""

    on_long: Literal["drop", "error"] = "drop"
    """Rows over `max_length` are left out and counted, or stop the run. They are never cut: a cut row loses
    its EOS."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where a GPU supports it, else float32."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""

    lora: LoraSettings | None = None
    """Train low-rank adapters instead of all weights."""

    checkpoint: CheckpointSettings = CheckpointSettings()
    """Checkpoints inside the stage."""

    log_every: PositiveInt = execution(10)
    """Optimiser steps between lines of metrics.jsonl."""

    samples_every: PositiveInt | None = execution(None)
    """Optimiser steps between entries of samples.jsonl. None: only at the end."""

    launch: LaunchSettings | None = execution(None)
    """Processes of this stage. None: the recipe's `launch`."""

    trainer_args: dict[str, Any] = {}
    """Passed to TRL's config of this stage as they are, for the arguments not modelled here. Names are
    checked; those that align sets itself are refused."""

    @property
    def quantise(self) -> str | None:
        """How the frozen base is held while an adapter is trained; None: in full."""
        return self.lora.quantise if self.lora else None

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """Rows per forward pass and process, and passes per step. Raises ValueError when `batch_size` cannot be divided
        so."""
        micro = self.micro_batch_size or max(1, self.batch_size // processes)
        passes, rest = divmod(self.batch_size, micro * processes)
        if rest or not passes:
            of = f" of {micro} rows (micro_batch_size)" if self.micro_batch_size else ""
            raise ValueError(f"batch_size {self.batch_size} cannot be divided among {processes} processes{of}")
        return micro, passes

    @model_validator(mode="after")
    def _micro_divides(self) -> TrainingSettings:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self
