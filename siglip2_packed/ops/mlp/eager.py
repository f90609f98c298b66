"""GELU (tanh form) fused with the linear layer before it, by torch: the contract, and what kernels are compared with.

Nothing here is differentiable: `fused` writes the backward out.

Shapes: T rows, D columns in, F columns out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, place: Tensor | None = None) -> Tensor:
    """gelu(x weightᵀ + bias), x `[T, D]`, weight `[F, D]` -> `[T, F]`, contiguous, which may be put into `place`."""
    if x.is_cuda and x.dtype != torch.float64:  # in the product's epilogue, by cuBLASLt
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=place)
    return gelu(F.linear(x, weight, bias))


def linear_gelu_keep(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """wide = x weightᵀ + bias, and gelu(wide): `[T, F]`, of x `[T, D]`, weight `[F, D]`."""
    wide = F.linear(x, weight, bias)
    return wide, gelu(wide)


def linear_gelu_backward(dout: Tensor, weight: Tensor, wide: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Backward of gelu(wide) weightᵀ, dout `[T, D]`, weight `[D, F]`, wide `[T, F]`, which is contiguous.

    Returns:
        The gradient of wide `[T, F]` and its column sums `[F]`; `active`, which may be wide itself, becomes gelu(wide).
    """
    dwide = dout @ weight
    return dwide, gelu_backward_(dwide, wide, active)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_backward_(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """grad `[T, F]`, of gelu(x), becomes dx, and `out`, which may be x itself, gelu(x). Returns dx's column sums `[F]`.

    All contiguous.
    """
    grad.copy_(torch.ops.aten.gelu_backward(grad, x, approximate="tanh"))  # copied: vmap has no rule for `grad_input=`
    torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    return grad.sum(0)
