"""Backward of GELU (tanh form) in Triton: one pass also gives GELU's output once more and the bias gradient.

Shapes: T rows, F columns, G groups of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.runtime import gelu
from siglip2_packed.ops.runtime.fold import fold
from siglip2_packed.ops.runtime.launch import ceil_div, launch, multiprocessors

SLOPE, CUBIC = tl.constexpr(gelu.SLOPE), tl.constexpr(gelu.CUBIC)


def linear_gelu_backward(dout: Tensor, weight: Tensor, wide: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """See `mlp.eager`."""
    dwide = dout @ weight
    return dwide, gelu_backward_(dwide, wide, active)


def gelu_backward_(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """grad `[T, F]`, of gelu(x), becomes dx, and `out`, which may be x itself, gelu(x). Returns dx's column sums `[F]`.

    All contiguous.
    """
    assert grad.is_contiguous()
    assert x.is_contiguous()
    assert out.is_contiguous()
    T, F = x.shape
    columns = 1024
    blocks = ceil_div(F, columns)
    groups = max(1, min(ceil_div(T, 16), 4 * multiprocessors(x.device) // blocks))
    sums = torch.empty((groups, F), dtype=torch.float32, device=x.device)
    launch(backward_kernel, (blocks, groups, 1), (grad, x, out, sums), (T,), (F, columns, 4), num_warps=4)
    return fold(sums, x.dtype)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(grad, x, out, sums, T, F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """A block of columns, every G-th group of ROWS rows. dx overwrites grad, its column sums stay in registers."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(tl.program_id(1) * ROWS, T, tl.num_programs(1) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * F + columns[None, :]
        mask = (rows < T)[:, None] & (columns < F)[None, :]
        u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(u * (SLOPE + CUBIC * u * u))
        d = g * (s + u * s * (1 - s) * (SLOPE + 3 * CUBIC * u * u))
        tl.store(out + at, (u * s).to(out.dtype.element_ty), mask=mask)
        tl.store(grad + at, d.to(grad.dtype.element_ty), mask=mask)
        total += tl.sum(d, 0)
    tl.store(sums + tl.program_id(1) * F + columns, total, mask=columns < F)
