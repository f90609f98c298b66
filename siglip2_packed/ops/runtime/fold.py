"""The second pass of sums over rows: partial sums, one a program of the first pass, added in a fixed order.

Shapes: G partial sums, C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.runtime.aside import beside, gradient
from siglip2_packed.ops.runtime.launch import ceil_div, launch


def fold(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Partial sums `[G, C]` in float32 -> `[C]` in `dtype`."""
    G, C = sums.shape
    with beside(sums):
        out = gradient(dtype, C)
        if out is None:
            out = torch.empty(C, dtype=dtype, device=sums.device)
        launch(fold_kernel, (ceil_div(C, 16), 1, 1), (sums, out), (G,), (C, 16, 256), num_warps=4)
    return out


@triton.jit(do_not_specialize=["G"])
def fold_kernel(sums, out, G, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, G, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < G)[:, None] & (columns < C)[None, :]
        total += tl.sum(tl.load(sums + rows[:, None] * C + columns[None, :], mask=mask, other=0.0), 0)
    tl.store(out + columns, total.to(out.dtype.element_ty), mask=columns < C)
