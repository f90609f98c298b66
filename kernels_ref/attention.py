"""Attention over packed segments: a plain loop, one segment at a time. Bidirectional, differentiable."""

from itertools import pairwise

import torch
from torch import Tensor

from .ops import wide


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, softmax_scale: float | None = None) -> Tensor:
    """q, k, v `[T, H, K]`, offsets `[S+1]` -> `[T, H, K]`: rows of a segment attend to that segment only.

    Computed in fp32 (fp64 for fp64), rounded to q's dtype. `softmax_scale` defaults to K**-0.5.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    outputs = [q[:0]]  # so that an empty pack gives [0, H, K]
    for start, end in segments(cu_seqlens, q.shape[0]):
        scores = torch.einsum("lhk,mhk->hlm", wide(q[start:end]), wide(k[start:end])) * scale
        outputs.append(torch.einsum("hlm,mhk->lhk", scores.softmax(dim=-1), wide(v[start:end])).to(q.dtype))
    return torch.cat(outputs)


def attention_pool(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, softmax_scale: float | None = None) -> Tensor:
    """One query per segment: q `[H, K]` (the same for all) or `[N, H, K]`; k, v `[T, H, K]`; -> `[N, H, K]`."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q = q.expand(len(cu_seqlens) - 1, -1, -1)
    outputs = [q[:0]]
    for i, (start, end) in enumerate(segments(cu_seqlens, k.shape[0])):
        scores = torch.einsum("hk,mhk->hm", wide(q[i]), wide(k[start:end])) * scale
        outputs.append(torch.einsum("hm,mhk->hk", scores.softmax(dim=-1), wide(v[start:end])).to(q.dtype)[None])
    return torch.cat(outputs)


def segments(cu_seqlens: Tensor, rows: int) -> list[tuple[int, int]]:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
        raise ValueError(f"cu_seqlens must rise from 0 to {rows} rows, got {offsets}")
    return list(pairwise(offsets))
