"""Attention as the formula says, one segment after another: what every other implementation is compared with.

Shapes: T rows, S segments, H heads, K head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from siglip2_packed.ops.attention import low_order
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
        for x, gradient in zip(into_s, _gradients(g_s, q_s, k_s, v_s, scale)):
            x.copy_(gradient)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    low: Tensor | None,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> None:
    """Fills out `[T, H, K]`, zeros beyond the last segment, and lse `[H, T]`, to base 2, as own kernels do.

    `low`, if it is kept, gets what rounding took from `out`; see `low_order`.
    """
    out.zero_()
    for rows in _segments(cu_seqlens):
        q_s, k_s, v_s = (_heads_first(x[rows]) for x in (q, k, v))
        s = q_s @ k_s.mT * scale
        exact = (s.softmax(-1) @ v_s).transpose(0, 1)
        out[rows] = exact
        if low is not None:
            low[rows] = low_order.of(exact, out[rows])
        lse[:, rows] = s.logsumexp(-1) * LOG2_E


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    low: Tensor | None,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> None:
    """Fills dq, dk and dv `[T, H, K]`, zeros beyond the last segment. What `forward` left is rounded, and not read."""
    for x in (dq, dk, dv):
        x.zero_()
    for rows in _segments(cu_seqlens):
        for x, gradient in zip((dq, dk, dv), _gradients(grad[rows], q[rows], k[rows], v[rows], scale)):
            x[rows] = gradient


def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv `[n, H, K]` of one segment.

    The sum of p dp is not taken as that of out * grad, `out` being rounded: rows of ds would not add up to zero, and dq
    would get what they do add up to times the mean key.
    """
    grad, q, k, v = map(_heads_first, (grad, q, k, v))
    p = (q @ k.mT * scale).softmax(-1)
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return (ds @ k).transpose(0, 1), (ds.mT @ q).transpose(0, 1), (p.mT @ grad).transpose(0, 1)


def _segments(cu_seqlens: Tensor) -> Iterator[slice]:
    return (slice(begin, end) for begin, end in itertools.pairwise(cu_seqlens.tolist()) if begin < end)


def _heads_first(x: Tensor) -> Tensor:
    """`[n, H, K]` -> `[H, n, K]`, in float32 at least."""
    return x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))
