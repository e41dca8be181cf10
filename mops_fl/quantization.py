"""Quantised weights of the frozen layers on a CPU: LLM.int8 and nf4, with bitsandbytes' weights and its rounding.

On a GPU bitsandbytes' own modules do this. On a CPU they do not serve: nf4 takes an inference kernel that hands no
gradient to its input, so prompts below it silently do not train, and LLM.int8 spends more time around its product
than in it. The modules here take bitsandbytes' quantised weights and keep them quantised, so they save the memory.

- `int8`: also the activations are rounded to 8 bit, row by row; columns of the input that hold an outlier are
  multiplied in full precision (Dettmers et al., arXiv 2208.07339, Section 3). The integer product is exact. Outlier
  columns are chosen over all rows of a call, so a row's result depends, by a rounding, on the rows beside it.
- `nf4`: blocks of 64 weights share a scale, each weight is one of 16 values (Dettmers et al., arXiv 2305.14314,
  Section 3, without double quantisation); activations are not rounded.

Gradients reach the input only, and pass the rounding of activations as if it were not there, as bitsandbytes has it.

Letters: `T` rows of activations, `D` input features, `N` output features.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

# It warns when imported of a kernel that nothing here uses, and in every product of a cast that belongs to LLM.int8.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
import bitsandbytes.functional as bnb  # noqa: E402

OUTLIER_THRESHOLD = 6.0  # transformers' default for bitsandbytes (`llm_int8_threshold`)


def gpu_quantization(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What makes transformers load a model onto a GPU with bitsandbytes' own modules: the same kinds, head left out."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def quantize_linears(layers: nn.Module, kind: str) -> None:
    """Replace every linear layer in `layers` by its quantised form, in place.

    Args:
        layers: the decoder layers; the head is not among them and keeps its precision, as in transformers.
        kind: `int8` or `nf4`.
    """
    quantized = {"int8": Int8Linear, "nf4": Nf4Linear}[kind]
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, quantized(child))


class Int8Linear(nn.Linear):
    """LLM.int8 on a CPU.

    Attributes:
        weight: `(N, D)` int8.
        scale: `(N,)` float32, the largest magnitude in each row of the dense weight.
        bias: `(N,)` or None.
    """

    scale: Tensor

    def __init__(self, dense: nn.Linear) -> None:
        """Quantise a linear layer's weight, row by row."""
        _init_empty(self, dense)
        weight, scale, _ = bnb.int8_vectorwise_quant(dense.weight.detach().to(torch.float16))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., D)` to `(..., N)`, in the input's dtype."""
        output: Tensor = _Int8Product.apply(  # type: ignore[no-untyped-call]
            input.flatten(0, -2), self.weight, self.scale, self.bias
        )
        return output.reshape(*input.shape[:-1], self.out_features)


class Nf4Linear(nn.Linear):
    """4-bit NormalFloat on a CPU.

    Attributes:
        weight: `(N * D / 2, 1)` uint8, two weights a byte.
        bias: `(N,)` or None.
    """

    def __init__(self, dense: nn.Linear) -> None:
        """Quantise a linear layer's weight, block by block."""
        _init_empty(self, dense)
        weight, self._state = bnb.quantize_4bit(dense.weight.detach(), quant_type="nf4")
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., D)` to `(..., N)`, in the input's dtype."""
        output: Tensor = _Nf4Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self._state, self.bias
        )
        return output


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weight, scale)
        rounded, absmax, outliers = quantize_rows(x)
        product: Tensor = torch.ops.bitsandbytes.int8_linear_matmul(rounded, weight)  # (T, N) int32
        output = (product * (absmax[:, None] / 127)).mul_(scale / 127)
        if bias is not None:
            output += bias
        output = output.to(x.dtype)
        if len(outliers):
            columns = _dequantized(weight.index_select(1, outliers), scale, x.dtype)
            output.addmm_(x.index_select(1, outliers), columns.T)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        weight, scale = ctx.saved_tensors
        return grad @ _dequantized(weight, scale, grad.dtype), None, None, None


class _Nf4Product(torch.autograd.Function):
    """Dequantises in both directions, so that no dense weight is held between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: bnb.QuantState, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weight)
        ctx.state = state
        return F.linear(x, bnb.dequantize_4bit(weight, state).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (weight,) = ctx.saved_tensors
        return grad @ bnb.dequantize_4bit(weight, ctx.state).to(grad.dtype), None, None, None


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round activations `(T, D)` to 8 bit, row by row, leaving out the columns that hold an outlier.

    Returns:
        `(T, D)` int8, zero in outlier columns; `(T,)` float32, the largest magnitude of each row that is no
        outlier; indices of the outlier columns.
    """
    if x.dtype == torch.float32:
        x = x.to(torch.float16)  # bitsandbytes rounds what float16 holds; bfloat16 fits in, apart from extremes
    magnitude = x.abs()
    outliers = (magnitude.amax(0) >= OUTLIER_THRESHOLD).nonzero().flatten()
    if len(outliers):
        magnitude = magnitude.masked_fill_(magnitude >= OUTLIER_THRESHOLD, 0)
    absmax = magnitude.amax(1).float()
    rounded = (x * (127 / absmax.clamp(min=1e-30))[:, None]).round_().to(torch.int8)
    return rounded.index_fill_(1, outliers, 0), absmax, outliers


def _init_empty(module: nn.Linear, dense: nn.Linear) -> None:
    nn.Linear.__init__(module, dense.in_features, dense.out_features, bias=False, device="meta")
    module.bias = dense.bias


def _dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_((scale / 127)[:, None])
