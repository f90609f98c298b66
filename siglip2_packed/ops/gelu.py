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


def gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of grad `[T, F]`, the gradient of gelu(x): dx `[T, F]`, gelu(x) once more, and the column sums of dx `[F]`."""
    if on_triton(x):
        from siglip2_packed.ops.triton.gelu import gelu_backward

        return gelu_backward(grad, x)
    dx = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    return dx, gelu(x), dx.sum(0)
