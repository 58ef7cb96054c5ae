"""NF4: a frozen base in 4 bits (QLoRA, Dettmers et al. 2023), by bitsandbytes, on CPU as on GPU.

Each weight is held as the nearest of 16 quantiles of the normal distribution, two to a byte, in units of the largest
absolute value of its block of 64, a float32: 0.5 + 4/64 = 0.5625 bytes per weight. Double quantisation would save 0.047
of them and round once more: off. Linear layers of the backbone are quantised; embeddings, norms, biases and heads are
not. The 4 bits of a layer are a function of its weights alone, so a base loaded twice, or once as a policy and once as
a reward model, is the same to the bit: an adapter trained on the one can be put on the other.

Import this module where something is quantised: bitsandbytes is an optional dependency.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D


class NF4Linear(Linear4bit):
    """A frozen linear layer in NF4 that computes as any linear layer does, in the dtype of its input or of autocast,
    with the weights that its 4 bits stand for.

    The library's own forward is not that. In evaluation mode, on a CPU with bfloat16 instructions, it computes in
    bfloat16 and rounds the stored scales for it, for good: sampling would change the weights that training sees. On a
    CPU with AVX-512 it takes the wrong scales when a row is not a whole number of blocks. And it rounds a bias, for
    good, to the first compute dtype it meets.
    """

    source_cls: type[nn.Module]
    """What the layer was before: a Linear or GPT-2's Conv1D, whose weight is transposed. Set by transformers."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Linear.apply(x.to(dtype), self, bias).to(x.dtype)  # type: ignore[union-attr]

    def weights(self, dtype: torch.dtype) -> Tensor:
        """What the 4 bits stand for, (out, in)."""
        fix_4bit_weight_quant_state_from_module(self)  # it is lost when the layer moves to another device
        state: Any = self.weight.quant_state  # type: ignore[attr-defined]
        arguments = (state.absmax, state.blocksize, state.quant_type, (1, state.shape.numel()), dtype)
        flat = torch.ops.bitsandbytes.dequantize_4bit.default(self.weight.data, *arguments)  # as one row: see above
        return flat.view(state.shape)

    def decoded(self) -> nn.Module:
        """The layer in full, float32, as it was before."""
        weight = self.weights(torch.float32)
        if self.source_cls is Conv1D:
            layer: nn.Module = Conv1D(self.out_features, self.in_features)
            weight = weight.T.contiguous()
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer


class _Linear(torch.autograd.Function):
    """x W^T + b with a frozen W that is decoded for each pass and not kept between them: the memory is the point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear, bias: Tensor | None) -> Tensor:
        """x (..., in) -> (..., out)."""
        ctx.layer = layer
        return linear(x, layer.weights(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """dL/dx = dL/dy W."""
        return grads[0] @ ctx.layer.weights(grads[0].dtype), None, None


def nf4_config() -> BitsAndBytesConfig:
    """What makes `from_pretrained` quantise a model while it is read. Read it as float32: the 4 bits must not depend on
    the dtype in which a stage computes."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)


def adopt_nf4(model: Any, dtype: torch.dtype) -> None:
    """Makes a model just read with `nf4_config` one that every library takes for what it is: a model in `dtype` with
    some frozen layers.

    Marked as quantised, TRL would train the adapter and a reward model's head in bfloat16, where an update below 0.4 %
    of a weight is lost, and peft would merge back into 4 bits, rounding the adapter away.
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.__class__ = NF4Linear
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    for parameter in model.parameters():  # and no buffers: rotary frequencies stay in float32
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
