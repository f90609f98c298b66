"""LayerNorm and the element-wise work around it, by torch: the contract, and what kernels are compared with.

Nothing here is differentiable: `fused` writes the backward out.

Shapes: T rows, D columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    waiting: Tensor | None = None,
    late: Tensor | None = None,
    place: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm of x + (waiting + late), statistics in float32 at least.

    Args:
        x: `[T, D]`.
        waiting, late: `[D]`, or None; `waiting` in float32 at least, not without `late`.
        place: `[T, D]` like x and `[D]` in float32, contiguous, where the results may be put.

    Returns:
        `[T, D]` in x's dtype; waiting + late `[D]` in float32 at least, None if both are.
    """
    if late is not None:
        late = late.to(torch.promote_types(late.dtype, torch.float32))
        waiting = late if waiting is None else waiting + late
        x = (x + waiting).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps), waiting


def add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + update `[T, D]`, and x + update + shift `[T, D]` with shift `[D]`."""
    total = x + update
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total.add_(shift)


def layer_norm_backward_(
    grad: Tensor,
    residual: Tensor,
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Backward of out = LayerNorm(h), h = x + update (or x), where h also goes on past the norm.

    Args:
        grad: `[T, D]`, contiguous, of out; becomes the whole gradient of h.
        residual: `[T, D]`, of h on its way past the norm.
        place: `[T, D]`, contiguous, nobody needs it any longer, so that out may be put there; update itself, say.

    Returns:
        out `[T, D]` once more; `[2, D]`, the gradients of weight and bias; with an update `[4, D]`: also the column
        sums of h's and of residual.
    """
    h = x if update is None else x + update
    out, mean, scale = torch.native_layer_norm(h, h.shape[-1:], weight, bias, eps)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, h, h.shape[-1:], mean, scale, weight, bias, [True, True, True]
    )
    grad.copy_(dx + residual)  # copied: vmap has no rules for `out=`
    sums = (dweight, dbias) if update is None else (dweight, dbias, grad.sum(0), residual.sum(0))
    return out, torch.stack(sums)
