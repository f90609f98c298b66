"""Sums over rows, in float32 and in two deterministic passes, and products over them.

Shapes: T rows, C and D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.runtime import aside
from siglip2_packed.ops.runtime.fold import fold
from siglip2_packed.ops.runtime.launch import ceil_div, launch, multiprocessors, next_power_of_2


def column_sums(x: Tensor) -> Tensor:
    """See `columns.eager`."""
    T, C = x.shape
    x = x.contiguous()
    columns = min(1024, next_power_of_2(C))
    blocks = ceil_div(C, columns)
    groups = max(1, min(ceil_div(T, 16), 4 * multiprocessors(x.device) // blocks))
    sums = torch.empty((groups, C), dtype=torch.float32, device=x.device)
    launch(partial_sums_kernel, (blocks, groups, 1), (x, sums), (T,), (C, columns, 4), num_warps=4)
    return fold(sums, x.dtype)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """See `columns.eager`; as (bᵀ a)ᵀ, which cuBLAS does a quarter faster for C > D."""
    return transposed(b.t() @ a, aside.gradient(a.dtype, a.shape[1], b.shape[1]))


def transposed(x: Tensor, out: Tensor | None = None) -> Tensor:
    """A contiguous copy `[C, T]` of `[T, C]`; compiled for each shape, so for weights, not for rows."""
    T, C = x.shape
    x = x.contiguous()
    out = torch.empty((C, T), dtype=x.dtype, device=x.device) if out is None else out
    if x.numel():
        grid = ceil_div(C, 64), ceil_div(T, 64), 1
        launch(transpose_kernel, grid, (x, out), (), (T, C, 64), num_warps=4)
    return out


@triton.jit(do_not_specialize=["T"])
def partial_sums_kernel(x, sums, T, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """A block of columns, every G-th group of ROWS rows: sums `[G, C]`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(tl.program_id(1) * ROWS, T, tl.num_programs(1) * ROWS, num_stages=3):
        rows = first + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * C + columns[None, :]
        mask = (rows < T)[:, None] & (columns < C)[None, :]
        total += tl.sum(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(sums + tl.program_id(1) * C + columns, total, mask=columns < C)


@triton.jit
def transpose_kernel(x, out, T: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr):
    columns = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    rows = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    x += rows.to(tl.int64)[:, None] * C + columns[None, :]
    tile = tl.load(x, mask=(rows < T)[:, None] & (columns < C)[None, :])
    out += columns.to(tl.int64)[:, None] * T + rows[None, :]
    tl.store(out, tl.trans(tile), mask=(columns < C)[:, None] & (rows < T)[None, :])
