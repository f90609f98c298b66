"""LayerNorm and the element-wise work around it. Triton on CUDA, torch elsewhere; nothing here is differentiable:
`fused` writes the backward out.

Shapes: T rows, D columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_packed.ops.attention import why_missing


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, offset: Tensor | None = None) -> Tensor:
    """LayerNorm of x + offset, statistics in float32 at least. x `[T, D]`, offset `[D]` -> `[T, D]` in x's dtype."""
    if on_triton(x):
        return _triton().layer_norm(x, weight, bias, eps, offset)
    return F.layer_norm(x if offset is None else (x + offset).to(x.dtype), x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + update `[T, D]`, and x + update + shift `[T, D]` with shift `[D]`."""
    if on_triton(x):
        return _triton().add_layer_norm(x, update, weight, bias, eps, shift)
    total = x + update
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total.add_(shift)


def layer_norm_backward(
    grad: Tensor, residual: Tensor, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of out = LayerNorm(h), h = x + update (or x), where h also goes on past the norm.

    Args:
        grad: `[T, D]`, of out.
        residual: `[T, D]`, of h on its way past the norm.

    Returns:
        The whole gradient of h `[T, D]`; out `[T, D]` once more; the gradients of weight and bias, and the column sums
        of the first result, `[D]` each, in float32 on CUDA.
    """
    if on_triton(x):
        return _triton().layer_norm_backward(grad, residual, x, update, weight, bias, eps)
    h = x if update is None else x + update
    out, mean, scale = torch.native_layer_norm(h, h.shape[-1:], weight, bias, eps)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, h, h.shape[-1:], mean, scale, weight, bias, [True, True, True]
    )
    dx = dx + residual
    return dx, out, dweight, dbias, dx.sum(0)


def on_triton(x: Tensor) -> bool:
    """Whether element-wise work on x runs in Triton: on CUDA, where Triton can be imported."""
    return x.is_cuda and why_missing("triton") is None


def _triton():
    from siglip2_packed.ops.triton import layer_norm

    return layer_norm
