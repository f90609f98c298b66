"""GELU (tanh form) fused with the linear layer before it. cuBLASLt and Triton on CUDA, torch elsewhere; nothing here is
differentiable: `fused` writes the backward out.

Shapes: T rows, D columns in, F columns out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_packed.ops.layer_norm import on_triton


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weightᵀ + bias), x `[T, D]`, weight `[F, D]` -> `[T, F]`. On CUDA GELU is the product's epilogue."""
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return gelu(F.linear(x, weight, bias))


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_backward_(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """grad `[T, F]`, of gelu(x), becomes dx, and `out`, which may be x itself, gelu(x). Returns dx's column sums `[F]`.

    All contiguous.
    """
    if on_triton(x):
        from siglip2_packed.ops.triton.gelu import gelu_backward_

        return gelu_backward_(grad, x, out)
    grad.copy_(torch.ops.aten.gelu_backward(grad, x, approximate="tanh"))  # copied: vmap has no rule for `grad_input=`
    torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    return grad.sum(0)
