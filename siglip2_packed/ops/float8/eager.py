"""Rows in float8 with a scale each, by torch: the contract, and what kernels are compared with.

Shapes: T rows, C columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_packed.ops.float8.format import LARGEST


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
    precise = torch.promote_types(x.dtype, torch.float32)
    total = x
    if update is not None:
        product, row_scale, column_scale, shift = update
        total = (x + product.to(precise) * row_scale * column_scale + shift).to(x.dtype)
    h = total.to(precise)
    if norm is not None:
        weight, bias, eps = norm
        h = F.layer_norm(h, h.shape[-1:], weight.to(precise), bias.to(precise), eps)
    if gelu:
        h = F.gelu(h, approximate="tanh")
    return *quantize(h), total


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float8 rows `[R, C]` and their scales `[R, 1]`: the largest of a row becomes the largest of float8."""
    scale = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale.float()
