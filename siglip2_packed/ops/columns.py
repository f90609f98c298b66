"""Sums and products over rows, as gradients of biases and weights are. Nothing here is differentiable.

Shapes: T rows, C and D columns.
"""

from __future__ import annotations

from torch import Tensor

from siglip2_packed.ops.layer_norm import on_triton

FEW_ROWS = 2048
"""With fewer, a pass over the rows takes less time than the host takes to launch one kernel more."""


def column_sums(x: Tensor) -> Tensor:
    """`[T, C]` -> `[C]`, summed in float32 at least: many rows on CUDA in two passes in Triton, others by torch."""
    if len(x) >= FEW_ROWS and on_triton(x):
        from siglip2_packed.ops.triton.columns import column_sums

        return column_sums(x)
    return x.sum(0)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b `[C, D]`, of a `[T, C]` and b `[T, D]`."""
    if len(a) >= FEW_ROWS and on_triton(a):  # as (bᵀ a)ᵀ, which cuBLAS does a quarter faster for C > D
        from siglip2_packed.ops.triton.columns import transposed

        return transposed(b.t() @ a)
    return a.t() @ b
