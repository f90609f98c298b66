"""Products of rows with a weight in Triton, each sum in one order: what a row gives does not depend on the others.

    linear             x Wᵀ + b
    add_product_       x + rows Wᵀ, in place
    linear_gelu        gelu(x Wᵀ + b)
    linear_gelu_keep   wide = x Wᵀ + b and gelu(wide)

A program has a tile of the result and goes through the contraction from its beginning to its end, STEP columns at a
time, in one float32 accumulator: nobody else adds to it. Tiles differ by the number of rows, so that few rows fill a
card; the tensor cores' instructions within a step, and so their order, do not.

Shapes: T rows, D columns in, F columns out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.runtime import choice, gelu
from siglip2_packed.ops.runtime.choice import ProductTile
from siglip2_packed.ops.runtime.launch import ceil_div, launch

STEP = 64
GROUP = 8
"""Rows of tiles that are gone through column by column: what they read stays in the cache."""
tiles = choice.product_tiles
SLOPE, CUBIC = tl.constexpr(gelu.SLOPE), tl.constexpr(gelu.CUBIC)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, place: Tensor | None = None, tile: ProductTile | None = None
) -> Tensor:
    """See `linear.eager`. Takes the tile for so many rows, where no other is asked for."""
    out = x.new_empty(len(x), len(weight)) if place is None else place
    _launch(x, weight, out, tile, bias=bias)
    return out


def add_product_(x: Tensor, rows: Tensor, weight: Tensor, tile: ProductTile | None = None) -> Tensor:
    """See `linear.eager`."""
    if not x.is_contiguous():
        return x.copy_(add_product_(x.contiguous(), rows, weight, tile))
    _launch(rows, weight, x, tile, add=True)
    return x


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, place: Tensor | None = None, tile: ProductTile | None = None
) -> Tensor:
    """See `mlp.eager`."""
    active = x.new_empty(len(x), len(weight)) if place is None else place
    _launch(x, weight, active, tile, bias=bias, active=active)
    return active


def linear_gelu_keep(x: Tensor, weight: Tensor, bias: Tensor, tile: ProductTile | None = None) -> tuple[Tensor, Tensor]:
    """See `mlp.eager`."""
    wide, active = (x.new_empty(len(x), len(weight)) for _ in range(2))
    _launch(x, weight, wide, tile, bias=bias, active=active)
    return wide, active


def _launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tile: ProductTile | None,
    bias: Tensor | None = None,
    active: Tensor | None = None,
    add: bool = False,
) -> None:
    """add: to what is in `out`. active: where GELU of the sum goes, which `out` then keeps if it is another."""
    (T, D), F = x.shape, len(weight)
    if weight.shape != (F, D) or out.shape != (T, F):
        raise ValueError(f"a weight {list(weight.shape)} does not take rows {list(x.shape)} to {list(out.shape)}")
    if T == 0:
        return
    tile = choice.product_tile(choice.card(x.device), T, F) if tile is None else tile
    gelus = 0 if active is None else 1 if active is out else 2
    launch(
        product_kernel,
        (ceil_div(T, tile.rows) * ceil_div(F, tile.columns), 1, 1),
        (
            x.contiguous(),
            weight.contiguous(),
            out if bias is None else bias.contiguous(),
            out,
            out if active is None else active,
        ),
        (T,),
        (D, F, bias is not None, add, gelus, tile.rows, tile.columns, STEP, GROUP, _precision(x.dtype)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit(do_not_specialize=["T"])
def product_kernel(
    x,
    weight,
    bias,
    out,
    active,
    T,
    D: tl.constexpr,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u = x Wᵀ, plus the bias, or what is in `out`. GELU 0: out = u; 1: active = gelu(u); 2: both, of the rounded u."""
    ACROSS: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    number = tl.program_id(0)
    first = number // (GROUP * ACROSS) * GROUP
    within = number % (GROUP * ACROSS)
    height = tl.minimum(tl.cdiv(T, ROWS) - first, GROUP)
    row = (first + within % height) * ROWS
    column = within // height * COLUMNS

    # beyond the last row and column the last one is read again, and not written
    rows = tl.minimum(row + tl.arange(0, ROWS), T - 1).to(tl.int64)
    columns = tl.minimum(column + tl.arange(0, COLUMNS), F - 1).to(tl.int64)
    steps = tl.arange(0, STEP)
    x += rows[:, None] * D + steps[None, :]
    weight += columns[None, :] * D + steps[:, None]
    u = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(D // STEP):
        u = tl.dot(tl.load(x), tl.load(weight), u, input_precision=PRECISION)
        x += STEP
        weight += STEP
    if D % STEP:
        a = tl.load(x, mask=steps[None, :] < D % STEP, other=0.0)
        b = tl.load(weight, mask=steps[:, None] < D % STEP, other=0.0)
        u = tl.dot(a, b, u, input_precision=PRECISION)

    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    here = (rows < T)[:, None] & (columns < F)[None, :]
    at = rows.to(tl.int64)[:, None] * F + columns[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    if BIAS:
        u += tl.load(bias + columns, mask=columns < F, other=0.0).to(tl.float32)[None, :]
    if ADD:
        u += tl.load(out + at, mask=here, other=0.0).to(tl.float32)
    if GELU != 1:
        tl.store(out + at, u.to(dtype), mask=here)
    if GELU == 2:
        u = u.to(dtype).to(tl.float32)
    if GELU:
        tl.store(active + at, (u * tl.sigmoid(u * (SLOPE + CUBIC * u * u))).to(dtype), mask=here)
