"""Rows in float8 with a scale each, made in the pass that a LayerNorm, a residual sum or GELU takes anyway.

Shapes: T rows, C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.triton.arguments import device_of, launch, next_power_of_2
from siglip2_packed.ops.triton.layer_norm import _normalise

LARGEST = tl.constexpr(448.0)  # of float8_e4m3fn


def quantize_rows(
    x: Tensor,
    update: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """f(x + update) in float8_e4m3fn, f LayerNorm, GELU (tanh form) or nothing.

    Args:
        x: `[T, C]`.
        update: a float8 product `[T, C]` with the scales of its rows `[T, 1]` and columns `[1, C]` and its bias `[C]`,
            which stands for product · scales + bias.
        norm: weight `[C]`, bias `[C]` and eps of a LayerNorm.

    Returns:
        `[T, C]` float8; `[T, 1]` float32 scales, value = float8 · scale; x + update `[T, C]` (x without an update).
    """
    T, C = x.shape
    x = x.contiguous()
    out = torch.empty((T, C), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((T, 1), dtype=torch.float32, device=x.device)
    total = x if update is None else torch.empty_like(x)
    product, row_scale, column_scale, shift = update or (x, scale, scale, x)
    weight, bias, eps = norm or (x, x, 0.0)
    if T:
        with device_of(x):
            launch(
                quantize_kernel,
                (T, 1, 1),
                (x, product, row_scale, column_scale, shift, total, weight, bias, out, scale),
                (float(eps),),
                (C, next_power_of_2(C), update is not None, norm is not None, gelu),
                num_warps=4 if C > 2048 else 2,
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
    COLUMNS: tl.constexpr,
    UPDATE: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    mask = columns < C
    at = row * C + columns
    h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if UPDATE:
        scales = tl.load(row_scale + row) * tl.load(column_scale + columns, mask=mask, other=0.0)
        h += tl.load(product + at, mask=mask, other=0.0).to(tl.float32) * scales
        h += tl.load(shift + columns, mask=mask, other=0.0).to(tl.float32)
        h = h.to(total.dtype.element_ty)
        tl.store(total + at, h, mask=mask)
        h = h.to(tl.float32)
    if NORM:
        h, _ = _normalise(h, mask, eps, C)
        h = h * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        h += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        h *= tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    largest = tl.maximum(tl.max(tl.abs(h), 0), 1e-12)
    tl.store(scale + row, largest / LARGEST)
    tl.store(out + at, (h * (LARGEST / largest)).to(out.dtype.element_ty), mask=mask)
