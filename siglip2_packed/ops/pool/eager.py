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
    precision = torch.promote_types(v.dtype, torch.float32)
    if transformed():  # torch.func has no rules for segment_reduce
        each = zip(k.to(precision).split(images.lengths), v.to(precision).split(images.lengths))
        query = q.to(precision) * q.shape[-1] ** -0.5
        pooled = [torch.einsum("th,thk->hk", torch.einsum("hk,thk->th", query, x).softmax(0), y) for x, y in each]
        return torch.stack(pooled).to(v.dtype)
    lengths = images.cu_seqlens.diff()
    scores = torch.einsum("hk,thk->th", q.to(precision) * q.shape[-1] ** -0.5, k.to(precision))
    with torch.no_grad():
        highest = torch.segment_reduce(scores, "max", lengths=lengths, unsafe=True)
    weights = (scores - highest.repeat_interleave(lengths, dim=0, output_size=k.shape[0])).exp()
    total = torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True)
    weights = weights / total.repeat_interleave(lengths, dim=0, output_size=k.shape[0])
    return torch.segment_reduce(weights[..., None] * v.to(precision), "sum", lengths=lengths, unsafe=True).to(v.dtype)
