"""Attention as the formula says, one segment after another: what every other implementation is compared with.

Shapes: T rows, S segments, H heads, K head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.segments import Segments


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """softmax(q kᵀ / sqrt(K)) v, softmax in float32 at least; differentiated by torch."""
    scale = q.shape[-1] ** -0.5
    outputs = []
    for q_s, k_s, v_s in zip(*(x.split(segments.lengths) for x in (q, k, v))):
        scores = torch.einsum("qhk,shk->hqs", q_s * scale, k_s)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        outputs.append(torch.einsum("hqs,shk->qhk", weights, v_s))
    return torch.cat(outputs)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Segments, into: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Fills `into`, dq, dk and dv `[T, H, K]`, with the gradients of `attention`, without autograd."""
    scale = q.shape[-1] ** -0.5
    for g_s, q_s, k_s, v_s, *into_s in zip(*(x.split(segments.lengths) for x in (grad, q, k, v, *into))):
        g, q_h, k_h, v_h = map(_heads_first, (g_s, q_s, k_s, v_s))
        p = (q_h @ k_h.mT * scale).softmax(-1)
        dp = g @ v_h.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        for x, gradient in zip(into_s, (ds @ k_h, ds.mT @ q_h, p.mT @ g)):
            x.copy_(gradient.transpose(0, 1))


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> None:
    """Fills out `[T, H, K]`, zeros beyond the last segment, and lse `[H, T]`, to base 2, as own kernels do."""
    out.zero_()
    for rows in _segments(cu_seqlens):
        q_s, k_s, v_s = (_heads_first(x[rows]) for x in (q, k, v))
        s = q_s @ k_s.mT * scale
        out[rows] = (s.softmax(-1) @ v_s).transpose(0, 1)
        lse[:, rows] = s.logsumexp(-1) * LOG2_E


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> None:
    """Fills dq, dk and dv `[T, H, K]`, zeros beyond the last segment, from what `forward` left."""
    for x in (dq, dk, dv):
        x.zero_()
    for rows in _segments(cu_seqlens):
        g_s, q_s, k_s, v_s, o_s = (_heads_first(x[rows]) for x in (grad, q, k, v, out))
        p = torch.exp2(q_s @ k_s.mT * (scale * LOG2_E) - lse[:, rows, None])
        ds = p * (g_s @ v_s.mT - (g_s * o_s).sum(-1, keepdim=True)) * scale
        for x, gradient in ((dq, ds @ k_s), (dk, ds.mT @ q_s), (dv, p.mT @ g_s)):
            x[rows] = gradient.transpose(0, 1)


def _segments(cu_seqlens: Tensor) -> Iterator[slice]:
    return (slice(begin, end) for begin, end in itertools.pairwise(cu_seqlens.tolist()) if begin < end)


def _heads_first(x: Tensor) -> Tensor:
    """`[n, H, K]` -> `[H, n, K]`, in float32 at least."""
    return x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))
