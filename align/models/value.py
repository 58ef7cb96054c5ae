"""The critic: a backbone with one number per token. Ours, so that every causal architecture can have one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import TokenClassifierOutput

from align.job import Input
from align.models.load import OFFSET_FIELD, load_policy, load_reward


class ValueModel(nn.Module):
    """V(s) read at every token: a transformer backbone and a linear head with a bias.

    The head works in its own dtype, float32: values are regressed to targets that differ by less than a bfloat16 step.
    """

    def __init__(self, backbone: Any, width: int):
        super().__init__()
        self.backbone = backbone
        self.score = nn.Linear(width, 1)

    def forward(self, input_ids: Tensor, **arguments: Any) -> TokenClassifierOutput:
        """input_ids (B,L) and the backbone's other arguments -> `.logits` (B,L,1) float32."""
        hidden = self.backbone(input_ids=input_ids, **arguments).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.score(hidden.to(self.score.weight.dtype))
        return TokenClassifierOutput(logits=logits)

    def gradient_checkpointing_enable(self, **arguments: Any) -> None:
        """Recompute the backbone's activations in the backward pass."""
        self.backbone.gradient_checkpointing_enable(**arguments)


def critic_from_reward(reward: Input, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> ValueModel:
    """A critic that starts as the normalised score: head, scale and offset are the reward model's.

    A prior and not yet a value: V_t is read one token before the action it is about.
    """
    model = load_reward(reward, tokenizer, dtype)
    critic = ValueModel(getattr(model, model.base_model_prefix), model.score.weight.shape[1])
    with torch.no_grad():
        critic.score.weight.copy_(model.score.weight)
        critic.score.bias.fill_(getattr(model.config, OFFSET_FIELD, 0.0))
    return critic


def critic_from_policy(policy: Input, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> ValueModel:
    """A critic on the policy's backbone, 0 everywhere at first: for a reward model with another tokenizer."""
    model = load_policy(policy, tokenizer, dtype)
    critic = ValueModel(model.base_model, model.get_output_embeddings().weight.shape[1])
    nn.init.zeros_(critic.score.weight)
    nn.init.zeros_(critic.score.bias)
    return critic
