"""Own attention for q, k and v: without autograd, through it, and as an operator that others can follow.

Shapes: T rows, S segments, H heads, K head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siglip2_packed.ops.attention import eager, low_order
from siglip2_packed.ops.attention.kernels import Kernels, kernels
from siglip2_packed.ops.runtime.check import Refused, checkable
from siglip2_packed.ops.runtime.once import once_differentiable
from siglip2_packed.ops.runtime.tracing import batched, no_tangent, traced, transformed
from siglip2_packed.ops.segments import check_rows, check_segments, positive_scale


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, kernels: Kernels | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`[T, H, K]`, its low-order part if backward reads it, and the base-2 log-sum-exp `[H, T]` in float32.

    `kernels` of a pack with rows.
    """
    T, H, K = q.shape
    out = torch.empty((T, H, K), dtype=q.dtype, device=q.device)
    low = low_order.empty_like(out) if kernels is not None and kernels.reads_low else None
    lse = torch.empty((H, T), dtype=torch.float32, device=q.device)
    if kernels is not None:
        kernels.forward(q, k, v, out, low, lse, cu_seqlens, max_seqlen, scale)
    return out, low, lse


def one_gradient(grad: Tensor) -> None:
    """RuntimeError for a batch of them (`is_grads_batched=True`), whose memory kernels cannot see."""
    if batched(grad):
        raise RuntimeError(
            "is_grads_batched: own attention kernels take one gradient at a time; with attn_implementation='sdpa' a "
            "batch of them works"
        )


def for_tensors(
    q: Tensor, cu_seqlens: Tensor, max_seqlen: int, packed: bool, gradients: bool, invariant: bool = False
) -> Kernels | None:
    """Those for q `[T, H, K]` and its like; None if there are no rows. Raises `Refused` where none is right."""
    if not q.shape[0]:
        return None
    (T, H, K), S, how = q.shape, len(cu_seqlens) - 1, {"gradients": gradients, "invariant": invariant}
    return kernels(q.device, q.dtype, (T, H, K), S, max_seqlen, packed=packed, **how)


class Attention(torch.autograd.Function):
    """`run_forward`, differentiable once."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen, scale, kernels):
        out, low, lse = run_forward(q, k, v, cu_seqlens, max_seqlen, scale, kernels)
        ctx.save_for_backward(q, k, v, cu_seqlens, out, low, lse)
        ctx.max_seqlen, ctx.scale, ctx.kernels = max_seqlen, scale, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        one_gradient(grad)
        q, k, v, cu_seqlens, out, low, lse = ctx.saved_tensors
        gradients = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
        if ctx.kernels is not None:
            ctx.kernels.backward(grad, q, k, v, out, low, lse, *gradients, cu_seqlens, ctx.max_seqlen, ctx.scale)
        return *gradients, None, None, None, None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
) -> Tensor:
    """softmax(softmax_scale * q kT) v within each segment, in both directions. Deterministic, forward and backward.

    Args:
        q, k, v: `[T, H, K]` of one dtype: bfloat16, float16, or float32 (in full precision, for checks). Last
            dimension contiguous, other strides multiples of 8 (anything else is copied); K a multiple of 8 up to 128.
        cu_seqlens: `[S+1]` int32 on the device of q, the first 0: segment s is rows cu_seqlens[s] to cu_seqlens[s+1].
        max_seqlen: at least the longest segment. Smaller is undefined, larger costs empty programs.
        softmax_scale: positive, K ** -0.5 by default.

    Returns:
        `[T, H, K]`, contiguous. Rows beyond cu_seqlens[-1] are zeros and get zero gradients. Differentiable once, in
        reverse mode.

    Raises:
        ValueError: what the arguments above exclude; kernels that are wrong here (`Refused`).
        RuntimeError: a tangent of forward mode.
    """
    check_rows(q=q, k=k, v=v)
    check_segments(q, cu_seqlens, max_seqlen)
    no_tangent(q, k, v)
    scale = positive_scale(q.shape[-1], softmax_scale)
    wanted = transformed() or q.requires_grad or k.requires_grad or v.requires_grad
    gradients = wanted and torch.is_grad_enabled()
    if traced():
        return attention(q, k, v, cu_seqlens, max_seqlen, scale, gradients)[0]
    chosen = for_tensors(q, cu_seqlens, max_seqlen, packed=False, gradients=gradients)
    if gradients:
        return Attention.apply(q, k, v, cu_seqlens, max_seqlen, scale, chosen)  # type: ignore[no-any-return]
    return run_forward(q, k, v, cu_seqlens, max_seqlen, scale, chosen)[0]


def _or_eager(q: Tensor, cu_seqlens: Tensor, max_seqlen: int, gradients: bool) -> Kernels | None:
    """In compiled code nobody is there to choose something else: torch, where no kernel is right."""
    try:
        return for_tensors(q, cu_seqlens, max_seqlen, packed=False, gradients=gradients)
    except Refused:
        if not checkable(q.device):
            raise
        return Kernels(eager.forward, eager.backward, ())


@torch.library.custom_op("siglip2_packed::varlen_attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, gradients: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _or_eager(q, cu_seqlens, max_seqlen, gradients)
    out, low, lse = run_forward(q, k, v, cu_seqlens, max_seqlen, scale, chosen)
    return out, _low_like(q, gradients).zero_() if low is None else low, lse


def _low_like(q: Tensor, gradients: bool) -> Tensor:
    """The low-order part of an operator's output, which cannot be None: without rows instead."""
    kept = gradients and q.dtype in low_order.SHIFT
    return q.new_empty(q.shape if kept else (0, *q.shape[1:]), dtype=torch.int8)


@torch.library.custom_op("siglip2_packed::varlen_attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    low: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    chosen = _or_eager(q, cu_seqlens, max_seqlen, gradients=True)
    if chosen is not None and chosen.backward is not None:
        kept = low if len(low) else None
        chosen.backward(grad, q, k, v, out, kept, lse, dq, dk, dv, cu_seqlens, max_seqlen, scale)
    return dq, dk, dv


@attention.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, scale, gradients=True):
    T, H, _ = q.shape
    return q.new_empty(q.shape), _low_like(q, gradients), q.new_empty((H, T), dtype=torch.float32)


@attention_backward.register_fake
def _(grad, q, k, v, out, low, lse, cu_seqlens, max_seqlen, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.max_seqlen, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    q, k, v, cu_seqlens, *kept = ctx.saved_tensors
    return *attention_backward(grad, q, k, v, *kept, cu_seqlens, ctx.max_seqlen, ctx.scale), None, None, None, None


attention.register_autograd(_differentiate, setup_context=_save)
