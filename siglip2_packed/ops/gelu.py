"""GELU (tanh form) fused with the linear layer before it, by kernels of our own on Hopper, by cuBLASLt and Triton on
CUDA, by torch elsewhere; nothing here is differentiable: `fused` writes the backward out.

Shapes: T rows, D columns in, F columns out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_packed.ops.layer_norm import on_triton
from siglip2_packed.ops.tracing import traced


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weightᵀ + bias), x `[T, D]`, weight `[F, D]` -> `[T, F]`."""
    kernels = _hopper(x)
    if kernels and (active := kernels.linear_gelu(x, weight, bias)) is not None:
        return active
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return gelu(F.linear(x, weight, bias))


def linear_gelu_keep(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """wide = x weightᵀ + bias, and gelu(wide): `[T, F]`, of x `[T, D]`, weight `[F, D]`."""
    kernels = _hopper(x)
    if kernels and (found := kernels.linear_gelu_keep(x, weight, bias)) is not None:
        return found
    wide = F.linear(x, weight, bias)
    return wide, gelu(wide)


def linear_gelu_backward(dout: Tensor, weight: Tensor, wide: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Backward of gelu(wide) weightᵀ, dout `[T, D]`, weight `[D, F]`, wide `[T, F]`, which is contiguous.

    Returns:
        The gradient of wide `[T, F]` and its column sums `[F]`; `active`, which may be wide itself, becomes gelu(wide).
    """
    kernels = _hopper(dout)
    if kernels and (found := kernels.linear_gelu_backward(dout, weight, wide, active)) is not None:
        return found
    dwide = dout @ weight
    return dwide, gelu_backward_(dwide, wide, active)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_backward_(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """grad `[T, F]`, of gelu(x), becomes dx, and `out`, which may be x itself, gelu(x). Returns dx's column sums `[F]`.

    All contiguous.
    """
    if on_triton(grad):
        from siglip2_packed.ops.triton.gelu import gelu_backward_

        return gelu_backward_(grad, x, out)
    grad.copy_(torch.ops.aten.gelu_backward(grad, x, approximate="tanh"))  # copied: vmap has no rule for `grad_input=`
    torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    return grad.sum(0)


def _hopper(x: Tensor):
    """The kernels that may have GELU in the product's epilogue; they decline what they do not fit."""
    if not on_triton(x) or traced():
        return None
    from siglip2_packed.ops.triton.arguments import capability, hopper_kernels

    return hopper_kernels("mlp_hopper") if capability(x) == 90 else None
