"""What `ppo`, `rloo` and `grpo` refuse when they are trained by several processes. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.ppo.config import Config


def process_problems(config: Config, processes: int) -> dict[str, str]:
    """As `Settings.process_problems`: each process has whole prompts, with all their responses."""
    if processes == 1:
        return {}
    among = f"cannot be divided among {processes} processes"
    problems, rollout = {}, config.rollout
    if rollout.prompts % processes:
        problems["rollout.prompts"] = f"{rollout.prompts} prompts {among}"
    elif config.responses // processes % config.minibatches:
        each = f"{config.responses // processes} responses of each of {processes} processes"
        problems["minibatches"] = f"{each} are not a multiple of {config.minibatches}"
    if config.ptx is not None and config.ptx.batch_size % processes:
        problems["ptx.batch_size"] = f"{config.ptx.batch_size} rows {among}"
    if rollout.address is not None:
        problems["rollout.address"] = "one server cannot hold the policies of several processes: each starts its own"
    return problems


def zero_problems(config: Config, stage: int) -> dict[str, str]:
    """As `Settings.zero_problems`."""
    if stage < 3:
        return {}
    problems = _parts_problems(config, "ZeRO-3")
    if config.gradient_checkpointing != "none" and config.lora is not None:
        what = "frozen weights that are in parts cannot be computed with again (ZeRO-3 with LoRA)"
        problems["gradient_checkpointing"] = what
    return problems


def fsdp_problems(config: Config, offloads: bool) -> dict[str, str]:
    """As `Settings.fsdp_problems`."""
    moved = {"launch": "shares cannot be moved to main memory under FSDP in this stage"} if offloads else {}
    return moved | _parts_problems(config, "FSDP")


def _parts_problems(config: Config, how: str) -> dict[str, str]:
    """What is not done with weights of which each process has a part."""
    lora, rollout = config.lora, config.rollout
    together = f"processes that hold a weight together cannot work at a pace of their own, as under {how}"
    problems = {
        "fp32_lm_head": (f"a head that is in parts is not computed in float32 ({how})", config.fp32_lm_head),
        "offload": (f"models that are in parts stay on the GPU ({how})", bool(config.offload)),
        "lora.quantise": (f"4-bit weights cannot be parted ({how})", bool(lora and lora.quantise)),
        "rollout.round_tokens": (together, rollout.round_tokens is not None),
        "rollout.overlap": (together, rollout.overlap),
    }
    return {key: what for key, (what, is_so) in problems.items() if is_so}
