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
    query = q.to(precision) * q.shape[-1] ** -0.5
    scores = (query * k.to(precision)).sum(-1)  # no product that autocast would round
    if transformed():  # torch.func has no rules for segment_reduce
        each = zip(scores.split(images.lengths), v.to(precision).split(images.lengths))
        return torch.stack([(x.softmax(0)[..., None] * y).sum(0) for x, y in each]).to(v.dtype)
    lengths = images.cu_seqlens.diff()
    with torch.no_grad():
        highest = torch.segment_reduce(scores, "max", lengths=lengths, unsafe=True)
    weights = (scores - highest.repeat_interleave(lengths, dim=0, output_size=k.shape[0])).exp()
    total = torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True)
    weights = weights / total.repeat_interleave(lengths, dim=0, output_size=k.shape[0])
    return torch.segment_reduce(weights[..., None] * v.to(precision), "sum", lengths=lengths, unsafe=True).to(v.dtype)
