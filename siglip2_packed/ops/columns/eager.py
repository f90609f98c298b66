"""Sums and products over rows, as gradients of biases and weights are, by torch: the contract.

Nothing here is differentiable. Shapes: T rows, C and D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siglip2_packed.ops.runtime import aside


def column_sums(x: Tensor) -> Tensor:
    """`[T, C]` -> `[C]` in x's dtype, summed in float32 at least."""
    out = aside.gradient(x.dtype, x.shape[1])
    return x.sum(0) if out is None else torch.sum(x, 0, out=out)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b `[C, D]`, contiguous, of a `[T, C]` and b `[T, D]`."""
    return aside.product_over_rows(a, b)
