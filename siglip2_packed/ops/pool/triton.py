"""Attention of one learned query over the rows of each image, in Triton: the pooling head.

Shapes: N images, T rows, H heads, K head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.runtime.launch import device_of, outer_strides, readable
from siglip2_packed.ops.runtime.tracing import no_tangent
from siglip2_packed.ops.segments import Segments, check_rows, check_segments, positive_scale


def attention_pool(q: Tensor, k: Tensor, v: Tensor, images: Segments) -> Tensor:
    """See `pool.eager`."""
    return varlen_attention_pool(q, k, v, images.cu_seqlens, images.max_seqlen)


def varlen_attention_pool(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float | None = None
) -> Tensor:
    """softmax(softmax_scale * q kT) v over each image's rows, computed in float32.

    Args:
        q: `[H, K]`, one query for all images; dtype and device of k.
        k, v: `[T, H, K]`, as in `varlen_attention`.
        cu_seqlens: `[N+1]` int32: image n is rows cu_seqlens[n] to cu_seqlens[n+1].
        max_seqlen: as in `varlen_attention`; the result does not depend on it.
        softmax_scale: positive, K ** -0.5 by default.

    Returns:
        `[N, H, K]`; zeros for an image without rows. Rows beyond cu_seqlens[-1] get zero gradients. The gradient of q
        is summed over images in float32, in a fixed order.

    Raises:
        ValueError: what the arguments above exclude.
        RuntimeError: a tangent of forward mode.
    """
    check_rows(k=k, v=v)
    if q.shape != k.shape[1:] or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q must be [H, K] = {list(k.shape[1:])} {k.dtype} on {k.device}, "
            f"got {list(q.shape)} {q.dtype} on {q.device}"
        )
    check_segments(k, cu_seqlens, max_seqlen)
    no_tangent(q, k, v)
    return _pool(q, k, v, cu_seqlens, positive_scale(k.shape[-1], softmax_scale))[0].to(v.dtype)


@triton.jit
def pool_kernel(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens,
    scale_log2,
    H,
    skt,
    skh,
    svt,
    svh,
    K: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out `[N, H, K]` and lse `[N, H]`, one program a (image, head)."""
    pid = tl.program_id(0).to(tl.int64)
    image, head = pid // H, pid % H
    skt, skh, svt, svh = skt * 8, skh * 8, svt * 8, svh * 8
    first = tl.load(cu_seqlens + image)
    length = tl.load(cu_seqlens + image + 1) - first
    lanes = tl.arange(0, LANES)
    rows = tl.arange(0, ROWS)
    real = lanes < K
    query = tl.load(q + head * K + lanes, mask=real, other=0.0).to(tl.float32) * scale_log2
    k += head * skh + first.to(tl.int64) * skt
    v += head * svh + first.to(tl.int64) * svt
    acc = tl.zeros([LANES], tl.float32)
    m = float("-inf")
    total = 0.0
    for start in tl.range(0, length, ROWS, num_stages=3):
        mask = (rows[:, None] < length - start) & real[None, :]
        key = tl.load(k + rows[:, None] * skt + lanes[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(v + rows[:, None] * svt + lanes[None, :], mask=mask, other=0.0).to(tl.float32)
        s = tl.where(rows < length - start, tl.sum(key * query[None, :], 1), float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - m_new)
        alpha = tl.exp2(m - m_new)
        acc = acc * alpha + tl.sum(p[:, None] * value, 0)
        total = total * alpha + tl.sum(p, 0)
        m = m_new
        k += ROWS * skt
        v += ROWS * svt
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(lse + pid, m + tl.log2(total))
    tl.store(out + pid * K + lanes, acc.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["T", "N"])
def pool_backward_kernel(
    q,
    k,
    v,
    out,
    grad,
    dq,
    dk,
    dv,
    lse,
    cu_seqlens,
    scale,
    scale_log2,
    T,
    N,
    H,
    skt,
    skh,
    svt,
    svh,
    K: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dk and dv (contiguous), and dq `[N, H, K]` of each image. Image N stands for the rows beyond the last image."""
    pid = tl.program_id(0).to(tl.int64)
    image, head = pid // H, pid % H
    skt, skh, svt, svh = skt * 8, skh * 8, svt * 8, svh * 8
    first = tl.load(cu_seqlens + image)
    lanes = tl.arange(0, LANES)
    rows = tl.arange(0, ROWS)
    real = lanes < K
    dk += (first.to(tl.int64) * H + head) * K
    dv += (first.to(tl.int64) * H + head) * K
    if image == N:
        zeros = tl.zeros([ROWS, LANES], dk.dtype.element_ty)
        for start in range(first, T, ROWS):
            mask = (rows[:, None] < T - start) & real[None, :]
            tl.store(dk + rows[:, None] * H * K + lanes[None, :], zeros, mask=mask)
            tl.store(dv + rows[:, None] * H * K + lanes[None, :], zeros, mask=mask)
            dk += ROWS * H * K
            dv += ROWS * H * K
        return
    length = tl.load(cu_seqlens + image + 1) - first
    k += head * skh + first.to(tl.int64) * skt
    v += head * svh + first.to(tl.int64) * svt
    query = tl.load(q + head * K + lanes, mask=real, other=0.0).to(tl.float32)
    g = tl.load(grad + pid * K + lanes, mask=real, other=0.0).to(tl.float32)
    delta = tl.sum(g * tl.load(out + pid * K + lanes, mask=real, other=0.0).to(tl.float32), 0)
    e = tl.load(lse + pid)
    acc = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, length, ROWS, num_stages=3):
        mask = (rows[:, None] < length - start) & real[None, :]
        key = tl.load(k + rows[:, None] * skt + lanes[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(v + rows[:, None] * svt + lanes[None, :], mask=mask, other=0.0).to(tl.float32)
        p = tl.exp2(tl.sum(key * query[None, :], 1) * scale_log2 - e)
        p = tl.where(rows < length - start, p, 0.0)
        ds = p * (tl.sum(value * g[None, :], 1) - delta) * scale
        acc += tl.sum(ds[:, None] * key, 0)
        tl.store(
            dk + rows[:, None] * H * K + lanes[None, :],
            (ds[:, None] * query[None, :]).to(dk.dtype.element_ty),
            mask=mask,
        )
        tl.store(
            dv + rows[:, None] * H * K + lanes[None, :], (p[:, None] * g[None, :]).to(dv.dtype.element_ty), mask=mask
        )
        k += ROWS * skt
        v += ROWS * svt
        dk += ROWS * H * K
        dv += ROWS * H * K
    tl.store(dq + pid * K + lanes, acc, mask=real)


@torch.library.custom_op("siglip2_packed::varlen_attention_pool", mutates_args=())
def _pool(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`[N, H, K]` and lse `[N, H]`, both in float32.

    Rounded, `out` would not be what the backward's weights sum up to: what is left of sum(p (dp - delta)), which is
    zero, multiplies the mean key, and keys may have a large one.
    """
    _, H, K = k.shape
    N = cu_seqlens.shape[0] - 1
    out = torch.empty((N, H, K), dtype=torch.float32, device=v.device)
    lse = torch.empty((N, H), dtype=torch.float32, device=v.device)
    if N == 0:
        return out, lse
    k, v = readable(k, v)
    with device_of(k):
        pool_kernel[(N * H,)](
            q.contiguous(),
            k,
            v,
            out,
            lse,
            cu_seqlens,
            scale * LOG2_E,
            H,
            *outer_strides(k, v),
            K=K,
            LANES=triton.next_power_of_2(K),
            ROWS=32,
            num_warps=4,
        )
    return out, lse


@torch.library.custom_op("siglip2_packed::varlen_attention_pool_backward", mutates_args=())
def _pool_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    T, H, K = k.shape
    N = cu_seqlens.shape[0] - 1
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    dq = torch.empty((N, H, K), dtype=torch.float32, device=k.device)
    if T == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), dk, dv
    k, v = readable(k, v)
    with device_of(k):
        pool_backward_kernel[((N + 1) * H,)](
            q.contiguous(),
            k,
            v,
            out,
            grad.contiguous(),
            dq,
            dk,
            dv,
            lse,
            cu_seqlens,
            scale,
            scale * LOG2_E,
            T,
            N,
            H,
            *outer_strides(k, v),
            K=K,
            LANES=triton.next_power_of_2(K),
            ROWS=32,
            num_warps=4,
        )
    return dq.sum(0).to(q.dtype), dk, dv


@_pool.register_fake
def _(q, k, v, cu_seqlens, scale):
    N = cu_seqlens.shape[0] - 1
    return v.new_empty((N, *v.shape[1:]), dtype=torch.float32), v.new_empty((N, v.shape[1]), dtype=torch.float32)


@_pool_backward.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _pool_autograd(ctx, grad, _):
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    if grad is None:
        return (None,) * 5
    return *_pool_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.scale), None, None


_pool.register_autograd(_pool_autograd, setup_context=_save)
