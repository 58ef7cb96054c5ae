"""How the processes of a stage are started: directly for one, through `accelerate launch` for more."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from align.errors import ConfigError, Problem
from align.pipeline.graph import Node, wanted_launch
from align.recipe.launch_settings import LaunchSettings, NodesSettings
from align.recipe.load import Recipe
from align.recipe.recipe_settings import RecipeSettings
from align.recipe.shipped import shipped_folder
from align.recipe.zero import nvme_folder, read_zero
from align.records import write_text

FOLDER = "launch"
"""In a run's folder: the accelerate config that each stage was started with, one for each machine."""

MACHINES_WAIT_S = 3600
"""Seconds that a machine waits for another one at the start of a stage: until that one has done what it does alone."""
_PRECISION = {"bf16": "bfloat16", "fp16": "float16"}
FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": False,
}
"""Of `fsdp_config` for `strategy: fsdp`."""


@dataclass(frozen=True)
class Launch:
    """The processes of one stage."""

    processes: int = 1
    """In all, over all machines."""
    accelerate: dict[str, Any] | None = None
    """Content of the accelerate config; None: one process, started directly."""

    def prepare(self, directory: Path) -> list[str]:
        """Writes what the launcher of a stage's folder needs, and returns the command line."""
        if self.accelerate is not None:
            write_text(self._file(directory), yaml.safe_dump(self.accelerate, sort_keys=False))
        return self.command(directory)

    def command(self, directory: Path) -> list[str]:
        """The command line that starts the stage of a folder."""
        worker = ["-m", "align.worker", str(directory)]
        if self.accelerate is None:
            return [sys.executable, *worker]
        arguments = ["--config_file", str(self._file(directory))]
        if self.accelerate["num_machines"] > 1:
            arguments += _meeting(self.accelerate)
        return [sys.executable, "-m", "align.launcher", *arguments, *worker]

    def _file(self, directory: Path) -> Path:
        machine = (self.accelerate or {}).get("machine_rank", 0)
        stage = directory.parent.name
        return directory.parents[1] / FOLDER / (f"{stage}-{machine}.yaml" if machine else f"{stage}.yaml")


def _meeting(config: dict[str, Any]) -> list[str]:
    """Arguments of the launcher that make machines wait for each other: it takes them from no config."""
    if config["rdzv_backend"] == "static":
        return ["--rdzv_conf", f"timeout={MACHINES_WAIT_S}"]
    is_host = str(config["machine_rank"] == 0).lower()
    waits = f"join_timeout={MACHINES_WAIT_S},read_timeout={MACHINES_WAIT_S}"
    return ["--rdzv_backend", config["rdzv_backend"], "--rdzv_conf", f"is_host={is_host},{waits}"]


def stage_launch(node: Node, recipe: Recipe) -> Launch:
    """How a stage is launched. Raises ConfigError when it cannot be so."""
    wanted = wanted_launch(node.config, recipe.settings)
    if not node.spec.distributed or wanted.is_direct:
        return Launch()
    # A port for each stage: else a machine that is done with one stage would meet those that still end it.
    place, nodes = list(recipe.stages).index(node.name), recipe.settings.nodes
    nodes = nodes.model_copy(update={"port": nodes.port + place})
    config = _own(nodes, wanted) if wanted.config is None else _given(nodes, Path(wanted.config))
    return Launch(config["num_processes"], config)


def check_launches(nodes: Sequence[Node], recipe: Recipe) -> None:
    """Raises ConfigError with all stages that cannot be launched as the recipe says."""
    problems = []
    for node in nodes:
        try:
            problems += _problems(node, recipe.settings, stage_launch(node, recipe))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)


def _problems(node: Node, settings: RecipeSettings, launch: Launch) -> Iterator[Problem]:
    for key, what in node.config.process_problems(launch.processes).items():
        yield Problem(f"{node.name}.{key}", what, "change it, or launch.processes")
    if launch.accelerate is not None and launch.processes % settings.nodes.count:
        what = f"{launch.processes} cannot be divided among {settings.nodes.count} machines"
        yield Problem(f"{node.name}: launch.processes", what)
    if launch.accelerate is not None:
        yield from _config_problems(node, launch.accelerate)


def _config_problems(node: Node, config: dict[str, Any]) -> Iterator[Problem]:
    said = _PRECISION.get(str(config.get("mixed_precision")), config.get("mixed_precision"))
    if said not in {None, False, "no", getattr(node.config, "precision", None)}:  # YAML reads `no` as false
        hint = f"remove it and set `{node.name}.precision`"
        yield Problem(f"{node.name}: mixed_precision", "the recipe says this", hint)
    if config.get("distributed_type") in {"DEEPSPEED", "FSDP"}:
        yield from _sharding_problems(node)
    if config.get("distributed_type") == "FSDP":
        yield from _fsdp_problems(node, config.get("fsdp_config") or {})
    if config.get("distributed_type") != "DEEPSPEED":
        return
    try:
        version("deepspeed")  # the folder `deepspeed/` would be found as a package of this name
    except PackageNotFoundError:
        yield Problem(f"{node.name}.launch", "DeepSpeed is not installed", "pip install 'align-rlhf[deepspeed]'")
    own = config.get("deepspeed_config") or {}
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        if own.get(key, "auto") != "auto":
            yield Problem(f"{node.name}: deepspeed_config.{key}", "the recipe says this", "remove it")
    stage = int(own.get("zero_stage", 2))
    if "deepspeed_config_file" in own:
        content = read_zero(Path(own["deepspeed_config_file"]))
        stage = content["zero_optimization"].get("stage", 0)
        folder = nvme_folder(content)
        if folder is not None and not Path(folder).is_dir():
            hint = "mount a disk there, or name a copy of the file in an accelerate config: `launch.config`"
            yield Problem(f"{node.name}.launch", f"{folder}: no such folder to move states to", hint)
    for key, what in node.config.zero_problems(stage).items():
        yield Problem(f"{node.name}.{key}", what, "change it, or launch.strategy")


def _sharding_problems(node: Node) -> Iterator[Problem]:
    if getattr(node.config, "precision", None) == "float16":
        what = "passes in float16 need a loss scale, which weights that are divided do not have here"
        yield Problem(f"{node.name}.precision", what, "use bfloat16, or launch.strategy: ddp")
    for key in ("optim", "critic.optim"):
        optim: Any = reduce(lambda found, name: getattr(found, name, None), key.split("."), node.config)
        if optim is not None and optim.kind != "adamw":
            what = f"{optim.kind} was never run on states that are divided"
            yield Problem(f"{node.name}.{key}.kind", what, "use adamw, whose moments `launch` divides or offloads")


def _fsdp_problems(node: Node, config: dict[str, Any]) -> Iterator[Problem]:
    where = f"{node.name}: fsdp_config"
    if config.get("fsdp_version") != FSDP["fsdp_version"]:
        yield Problem(f"{where}.fsdp_version", "version 2 is needed", "set `fsdp_version: 2`")
    if config.get("fsdp_activation_checkpointing"):
        hint = f"remove it and set `{node.name}.gradient_checkpointing`"
        yield Problem(f"{where}.fsdp_activation_checkpointing", "the recipe says this", hint)
    if config.get("fsdp_state_dict_type", FSDP["fsdp_state_dict_type"]) != FSDP["fsdp_state_dict_type"]:
        yield Problem(f"{where}.fsdp_state_dict_type", "each process saves its own part", "set SHARDED_STATE_DICT")
    if getattr(node.config, "quantise", None):
        yield Problem(f"{node.name}.lora.quantise", "FSDP cannot shard weights in 4 bits", "use another strategy")
    for key, what in node.config.fsdp_problems(bool(config.get("fsdp_offload_params"))).items():
        yield Problem(f"{node.name}.{key}", what, "change it, or launch.strategy")


def _own(nodes: NodesSettings, launch: LaunchSettings) -> dict[str, Any]:
    """The accelerate config for `processes` and `strategy`."""
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",  # also where there are only CPUs: MULTI_CPU wants MPI
        "num_processes": launch.processes,
    }
    if launch.strategy == "fsdp":
        config |= {"distributed_type": "FSDP", "fsdp_config": FSDP}
    elif launch.strategy != "ddp":
        file = shipped_folder("deepspeed") / f"{launch.strategy.replace('-', '_')}.json"
        config["distributed_type"] = "DEEPSPEED"
        config["deepspeed_config"] = {"deepspeed_config_file": str(file), "zero3_init_flag": False}
    return _placed(config, nodes)


def _given(nodes: NodesSettings, path: Path) -> dict[str, Any]:
    """The user's accelerate config, its paths absolute."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(Problem("launch.config", f"not a readable accelerate config: {error}")) from error
    if not isinstance(config, dict) or not isinstance(config.get("num_processes"), int):
        raise ConfigError(Problem("launch.config", f"{path} does not say `num_processes`"))
    own = config.get("deepspeed_config") or {}
    if "deepspeed_config_file" in own:
        own["deepspeed_config_file"] = str(path.parent / own["deepspeed_config_file"])
    return _placed(config, nodes)


def _placed(config: dict[str, Any], nodes: NodesSettings) -> dict[str, Any]:
    if nodes.count == 1:
        return {"num_machines": 1, "machine_rank": 0, "main_process_port": 0, **config}
    if "deepspeed_config" in config:
        config["deepspeed_config"].setdefault("deepspeed_multinode_launcher", "standard")
    return config | {
        "num_machines": nodes.count,
        "machine_rank": nodes.rank,
        "main_process_ip": nodes.address,
        "main_process_port": nodes.port,
        "rdzv_backend": nodes.rendezvous,
        "same_network": True,
    }
