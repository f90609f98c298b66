"""Products of rows with a weight, by torch: the contract, and what kernels are compared with.

Nothing here is differentiable: `fused` writes the backward out.

Shapes: T rows, D columns in, F columns out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor, place: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, x `[T, D]`, weight `[F, D]` -> `[T, F]`, which may be put into `place`, contiguous."""
    return F.linear(x, weight, bias) if place is None else torch.addmm(bias, x, weight.t(), out=place)


def add_product_(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """x `[T, F]` += rows weightᵀ, rows `[T, D]`, weight `[F, D]`, in place; returns x.

    On the CPU in two steps: its BLAS would add the product in parts, rounding each to the size of x.
    """
    return x.addmm_(rows, weight.t()) if x.is_cuda else x.add_(F.linear(rows, weight))
