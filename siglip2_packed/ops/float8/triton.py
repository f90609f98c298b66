"""Rows in float8 with a scale each, made in the pass that a LayerNorm, a residual sum or GELU takes anyway.

Shapes: T rows, C columns in blocks of W.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.float8 import format
from siglip2_packed.ops.runtime import gelu, rows
from siglip2_packed.ops.runtime import launch as launching
from siglip2_packed.ops.runtime.launch import launch

LARGEST = tl.constexpr(format.LARGEST)
SLOPE_LOG2, CUBIC_LOG2 = tl.constexpr(gelu.SLOPE_LOG2), tl.constexpr(gelu.CUBIC_LOG2)
EXP2, RECIPROCAL = tl.constexpr("ex2.approx.ftz.f32 $0, $1;"), tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
INTERPRETED = tl.constexpr(launching.INTERPRETED)


def quantize_rows(
    x: Tensor,
    update: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `float8.eager`."""
    T, C = x.shape
    x = x.contiguous()
    out = torch.empty((T, C), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((T, 1), dtype=torch.float32, device=x.device)
    total = x if update is None else torch.empty_like(x)
    product, row_scale, column_scale, shift = update or (x, scale, scale, x)
    weight, bias, eps = norm or (x, x, 0.0)
    width, warps = rows.cut(C, at_once=8, most=36)
    if T:
        launch(
            quantize_kernel,
            (T, 1, 1),
            (x, product, row_scale, column_scale, shift, total, weight, bias, out, scale),
            (float(eps),),
            (C, width, update is not None, norm is not None, gelu),
            num_warps=warps,
        )
    return out, scale, total


@triton.jit
def quantize_kernel(
    x,
    product,
    row_scale,
    column_scale,
    shift,
    total,
    weight,
    bias,
    out,
    scale,
    eps,
    C: tl.constexpr,
    W: tl.constexpr,
    UPDATE: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = number * C
    h = rows.read(x + row, C, W)
    if UPDATE:
        update = rows.scaled(rows.read(product + row, C, W), tl.load(row_scale + number))
        update = rows.multiply(update, rows.read(column_scale, C, W))
        h = rows.add(rows.add(h, update), rows.read(shift, C, W))
        h = rows.rounded(h, total.dtype.element_ty)
        rows.write(total + row, h, C, W)
    if NORM:
        h, _ = rows.normalise(h, eps, C, W)
        h = rows.add(rows.multiply(h, rows.read(weight, C, W)), rows.read(bias, C, W))
    if GELU:
        h = rows.each(h, _gelu)
    largest = tl.maximum(rows.largest(h), 1e-12)
    tl.store(scale + number, largest / LARGEST)
    rows.write(out + row, rows.scaled(h, LARGEST / largest), C, W)


@triton.jit
def _gelu(u):
    return u * _sigmoid(u * (SLOPE_LOG2 + CUBIC_LOG2 * u * u))


@triton.jit
def _sigmoid(x):
    """1 / (1 + 2^x). Triton's own exp2 and division take twice as long, for the sake of numbers that are nearly 0."""
    if INTERPRETED:
        y = 1.0 / (1.0 + tl.exp2(x))
    else:
        power = tl.inline_asm_elementwise(EXP2, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        y = tl.inline_asm_elementwise(RECIPROCAL, "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1)
    return y
