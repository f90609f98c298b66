"""Attention of one query per image over the image's own rows, by torch: the contract.

Shapes: N images, T rows, H heads, K head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siglip2_packed.ops.runtime.tracing import transformed
from siglip2_packed.ops.segments import Segments


def attention_pool(q: Tensor, k: Tensor, v: Tensor, images: Segments) -> Tensor:
    """softmax(q kᵀ / sqrt(K)) v over each image's rows, accumulated in float32 (float64 for float64); differentiable.

    Args:
        q: `[H, K]`, one query shared by all images.
        k, v: `[T, H, K]`.
        images: rows of each image, N of them, adding up to T.

    Returns:
        `[N, H, K]` in v's dtype.
    """
    dtype, precision = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k, v = q.to(precision) * q.shape[-1] ** -0.5, k.to(precision), v.to(precision)
    if transformed():  # torch.func has no rules for segment_reduce
        each = zip(k.split(images.lengths), v.split(images.lengths))
        pooled = torch.stack([(_scores(q, x, x.mean(0)).softmax(0)[..., None] * y).sum(0) for x, y in each])
        return pooled.to(dtype)
    lengths = images.cu_seqlens.diff()

    def of_image(x: Tensor) -> Tensor:
        """`[N, ...]` -> `[T, ...]`"""
        return x.repeat_interleave(lengths, dim=0, output_size=k.shape[0])

    with torch.no_grad():
        common = of_image(torch.segment_reduce(k, "mean", lengths=lengths, unsafe=True))
    scores = _scores(q, k, common)
    with torch.no_grad():
        highest = torch.segment_reduce(scores, "max", lengths=lengths, unsafe=True)
    weights = (scores - of_image(highest)).exp()
    weights = weights / of_image(torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True))
    return torch.segment_reduce(weights[..., None] * v, "sum", lengths=lengths, unsafe=True).to(dtype)


def _scores(q: Tensor, k: Tensor, common: Tensor) -> Tensor:
    """q kᵀ `[T, H]`, less q times what an image's keys have in common.

    No weight changes by it; and the sum of the scores' gradients, zero but for rounding, multiplies no mean key on its
    way to q. Autocast would round a product.
    """
    return (q * (k - common)).sum(-1)
