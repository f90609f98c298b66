"""Column sums and transposes. Triton on CUDA, torch elsewhere; nothing here is differentiable.

Shapes: T rows, C columns.
"""

from __future__ import annotations

from torch import Tensor

from siglip2_packed.ops.layer_norm import on_triton


def column_sums(x: Tensor) -> Tensor:
    """`[T, C]` -> `[C]`, summed in float32 at least."""
    if on_triton(x):
        from siglip2_packed.ops.triton.columns import column_sums

        return column_sums(x)
    return x.sum(0)


def transposed(x: Tensor) -> Tensor:
    """A contiguous copy `[C, T]` of `[T, C]`."""
    if on_triton(x):
        from siglip2_packed.ops.triton.columns import transposed

        return transposed(x)
    return x.t().contiguous()
