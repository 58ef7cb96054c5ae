"""One frozen base in memory, and the LoRA adapters that make it actor, critic and reward models.

The base as it is, adapters off, is the reference. peft's own `set_adapter` also decides what requires a gradient, which
must not change between a forward and a backward pass; so it is not used. What is trained is decided when an adapter is
added, and switching only says which adapter computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from align.errors import ArtifactError
from align.job import Input
from align.models.handover import verify_values
from align.models.load import OFFSET_FIELD, disable_dropout, local_folder
from align.models.lora import add_lora, without_wrapper
from align.models.reward import score_sequences
from align.models.roles import Role, causal_role, score
from align.models.value import ValueHead
from align.recipe.training_settings import LoraSettings

ACTOR = "default"
"""peft's name for a single adapter: the only one that it saves into the folder itself and not into one below."""
CRITIC = "critic"
HEAD_KEY = "base_model.model.score.weight"
"""The head of a reward model in the file of its adapter."""


@dataclass(frozen=True)
class _Reward:
    """A reward model on the base: its adapter's name, its head (1,H), its offset."""

    adapter: str
    head: Tensor
    offset: float


class AdaptedBase:
    """A frozen causal language model and the adapters on it.

    `settings` are those of the actor's adapter; None: there is no actor, and at rest the base computes as it is.
    Dropout is off, that of the adapters too: the ratio of new to old policy must be 1 at the first step.
    """

    def __init__(self, model: Any, settings: LoraSettings | None):
        self.model: Any = model if settings is None else add_lora(model, settings)
        """With an actor a PeftModel: at rest the actor's adapter is active, so that `generate` samples the actor."""
        self._rewards: dict[str, _Reward] = {}
        self._rest = None if settings is None else ACTOR
        self._current = self._rest
        self._settle()
        self.model.train(settings is not None)

    def actor(self, fp32_head: bool = False) -> Role:
        """The trained adapter on the base."""
        return self._causal(ACTOR, fp32_head)

    def base_role(self) -> Role:
        """The base itself, adapters off: the reference."""
        return self._causal(None)

    def reward(self, name: str, source: Input) -> Role:
        """The reward model `name`: the adapter and head in `adapter/` of a committed reward model that was trained on
        this very base.

        Raises ArtifactError when they do not fit the base, or do not give the scores that the reward model gave.
        """
        folder = Path(local_folder(source))
        adapter = f"reward{len(self._rewards)}"  # a term's name may hold dots, which a module's may not
        offset = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(OFFSET_FIELD, 0.0)
        head = self._load(adapter, folder / "adapter", source.source)
        self._rewards[name] = _Reward(adapter, head, offset)
        role = self._role(adapter, lambda states: score(states, head, offset), head.shape[1])
        with role.evaluating():
            found = verify_values(
                lambda probes: score_sequences(role, probes, 0).tolist(),
                folder,
                self.model.dtype,
                f"{source.source}, its adapter on this base",
            )
        if found is None:
            raise ArtifactError(f"{source.source}: {folder} holds no probes to check its adapter with on this base")
        return role

    def critic(self, init: str | None) -> Role:
        """A trained adapter with a value head: a copy of the reward model `init`, adapter, head and offset; None: the
        base, and 0 everywhere."""
        start = None if init is None else self._rewards[init]
        self._add(CRITIC, deepcopy(self.model.peft_config[ACTOR if start is None else start.adapter]))
        width = without_wrapper(self.model).get_output_embeddings().weight.shape[1]
        head = ValueHead(width).to(self.model.device)
        if start is not None:
            self._copy(start.adapter, CRITIC)
            head.start_from(start.head, start.offset)
        role = self._role(CRITIC, head, width)

        def trained() -> Iterator[tuple[str, nn.Parameter]]:
            yield from self._parameters(CRITIC)
            yield from head.named_parameters("head")

        return replace(role, trained=trained)

    @contextmanager
    def playing(self, adapter: str | None) -> Iterator[None]:
        """Inside, this adapter computes (None: the base alone); after, what did before."""
        before = self._current
        self._switch(adapter)
        try:
            yield
        finally:
            self._switch(before)

    def _causal(self, adapter: str | None, fp32_head: bool = False) -> Role:
        with self.playing(adapter):
            role = causal_role(self.model, fp32_head)
        return self._role(adapter, role.head, role.width)

    def _role(self, adapter: str | None, head: Any, width: int) -> Role:
        body = without_wrapper(self.model).base_model
        return Role(
            self.model, body, head, width, lambda: self.playing(adapter), lambda: iter(self._parameters(adapter))
        )

    def _parameters(self, adapter: str | None) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters of an adapter."""
        named = self.model.named_parameters()
        return [(name, weight) for name, weight in named if weight.requires_grad and adapter in name.split(".")]

    def _switch(self, adapter: str | None) -> None:
        if adapter == self._current:
            return
        self._current = adapter
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    def _settle(self) -> None:
        """After an adapter was added: fixes what is trained, takes dropout out, and goes back to rest."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not {ACTOR, CRITIC}.isdisjoint(name.split(".")))
        disable_dropout(self.model)
        self._layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self._current = ""  # unknown: peft may have activated what it added
        self._switch(self._rest)

    def _add(self, adapter: str, config: Any) -> None:
        config.modules_to_save, config.task_type, config.lora_dropout = None, TaskType.CAUSAL_LM, 0.0
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(adapter, config)
        else:
            self.model = get_peft_model(self.model, config, adapter)
        self._settle()

    def _load(self, adapter: str, folder: Path, source: str) -> Tensor:
        """Adds a saved reward adapter, frozen. Returns its head (1,H), float32."""
        try:
            weights = load_file(folder / "adapter_model.safetensors")
            head = weights.pop(HEAD_KEY).float().to(self.model.device)
            self._add(adapter, LoraConfig.from_pretrained(str(folder)))
            result = set_peft_model_state_dict(self.model, weights, adapter)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{source}: {folder} is no reward adapter on this base: {reason}") from error
        lost = [key for key in result.missing_keys if adapter in key.split(".")] + list(result.unexpected_keys)
        if lost:
            raise ArtifactError(f"{source}: {folder} was trained on another architecture than this base: {lost[0]}")
        return head

    def _copy(self, source: str, target: str) -> None:
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                parts = name.split(".")
                if source in parts:
                    weights[".".join(target if part == source else part for part in parts)].copy_(weight)
