"""Attention segment by segment as one operator, for torch.compile: one graph serves packs of any segments.

Traced, a loop over segments is another graph for every pack.

Shapes: T rows, S segments, H heads, K head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siglip2_packed.ops.attention import eager, outside
from siglip2_packed.ops.segments import Segments

RUN = {"eager": eager.attention, "sdpa": outside.sdpa}


@torch.library.custom_op("siglip2_packed::attention_by_segments", mutates_args=())
def attention_by_segments(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """q, k, v `[T, H, K]` and offsets `[S+1]`, on the host -> `[T, H, K]`, contiguous; differentiable once."""
    return RUN[backend](q, k, v, _segments(q, offsets)).contiguous()


@torch.library.custom_op("siglip2_packed::attention_by_segments_backward", mutates_args=())
def attention_by_segments_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    eager.gradients(grad, q, k, v, _segments(q, offsets), (dq, dk, dv))
    return dq, dk, dv


def _segments(q: Tensor, offsets: Tensor) -> Segments:
    return Segments(offsets.diff().tolist(), q.device)


@attention_by_segments.register_fake
def _(q, k, v, offsets, backend):
    return q.new_empty(q.shape)


@attention_by_segments_backward.register_fake
def _(grad, q, k, v, offsets):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx, grad):
    return *attention_by_segments_backward(grad, *ctx.saved_tensors), None, None


attention_by_segments.register_autograd(_differentiate, setup_context=_save)
