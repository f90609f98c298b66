"""Sums and products over rows, as gradients of biases and weights are. Nothing here is differentiable.

Shapes: T rows, C and D columns.
"""

from __future__ import annotations

from torch import Tensor

from siglip2_packed.ops.layer_norm import on_triton

FEW_ROWS = 2048
"""With fewer, a pass over the rows takes less time than the host takes to launch one kernel more."""


def column_sums(x: Tensor) -> Tensor:
    """`[T, C]` -> `[C]`, summed in float32 at least. Two passes in Triton on CUDA, torch elsewhere."""
    if len(x) >= FEW_ROWS and on_triton(x):
        from siglip2_packed.ops.triton.columns import column_sums

        return column_sums(x)
    return x.sum(0)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b `[C, D]`, of a `[T, C]` and b `[T, D]`, C > D: asked of cuBLAS as (bᵀ a)ᵀ, a quarter faster."""
    if len(a) >= FEW_ROWS and on_triton(a):
        from siglip2_packed.ops.triton.columns import transposed

        return transposed(b.t() @ a)
    return a.t() @ b
