"""Bidirectional varlen attention in Triton, as operators that torch.compile, checkpointing and FSDP see through.

Made for SigLIP2: head_dim 64 and 72, segments of 64 to 1024 patches, where the time is that of reading and writing
the tensors. One launch for any mix of lengths, no copy of strided inputs, no device-to-host copy.

Shapes: T rows, S segments, H heads, K head_dim.
"""

import functools

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from siglip2_packed.ops.tracing import traced
from siglip2_packed.ops.triton import attention_kernels as kernels
from siglip2_packed.ops.triton.arguments import (
    LOG2_E,
    aligned,
    capability,
    ceil_div,
    check,
    check_rows,
    device_of,
    hopper_kernels,
    launch,
    multiprocessors,
    strides,
)
from siglip2_packed.ops.triton.attention_pool import varlen_attention_pool

__all__ = ["varlen_attention", "varlen_attention_pool", "varlen_attention_qkvpacked"]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    deterministic: bool = False,
) -> Tensor:
    """softmax(softmax_scale * q kT) v within each segment, in both directions.

    Args:
        q, k, v: `[T, H, K]` of one dtype: bfloat16, float16, or float32 (in full precision, for checks). Last
            dimension contiguous, other strides multiples of 8 (anything else is copied); K a multiple of 8 up to 128.
        cu_seqlens: `[S+1]` int32 on the device of q, the first 0: segment s is rows cu_seqlens[s] to cu_seqlens[s+1].
        max_seqlen: at least the longest segment. Smaller is undefined, larger costs empty programs.
        softmax_scale: positive, K ** -0.5 by default.
        deterministic: accepted for the signature's sake. Every result is deterministic, forward and backward.

    Returns:
        `[T, H, K]`, contiguous. Rows beyond cu_seqlens[-1] are zeros and get zero gradients. Differentiable once, in
        reverse mode.

    Raises:
        ValueError: what the arguments above exclude.
    """
    check_rows(q=q, k=k, v=v)
    scale = check(q, cu_seqlens, max_seqlen, softmax_scale)
    run = _attention if traced() else _Attention.apply if torch.is_grad_enabled() else forward
    return run(q, k, v, cu_seqlens, max_seqlen, scale)[0]


def varlen_attention_qkvpacked(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float | None = None, deterministic: bool = False
) -> Tensor:
    """`varlen_attention` of `qkv.unbind(1)` for qkv `[T, 3, H, K]`, whose gradient is written as one tensor."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be [T, 3, H, K], got {list(qkv.shape)}")
    check_rows(qkv=qkv[:, 0])
    scale = check(qkv, cu_seqlens, max_seqlen, softmax_scale)
    if not (traced() or torch.is_grad_enabled()):
        q, k, v = qkv.unbind(1)
        return forward(q, k, v, cu_seqlens, max_seqlen, scale)[0]
    run = _attention_qkvpacked if traced() else _AttentionQKVPacked.apply
    return run(qkv, cu_seqlens, max_seqlen, scale)[0]


@torch.library.custom_op("siglip2_packed::varlen_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, cu_seqlens, max_seqlen, scale)


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    _backward(grad, q, k, v, out, lse, dq, dk, dv, cu_seqlens, max_seqlen, scale)
    return dq, dk, dv


@torch.library.custom_op("siglip2_packed::varlen_attention_qkvpacked", mutates_args=())
def _attention_qkvpacked(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(1)
    return forward(q, k, v, cu_seqlens, max_seqlen, scale)


def gradients_qkvpacked(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    write_gradients_qkvpacked(dqkv, grad, qkv, out, lse, cu_seqlens, max_seqlen, scale)
    return dqkv


def write_gradients_qkvpacked(
    dqkv: Tensor,
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> None:
    """Fills dqkv `[T, 3, H, K]`, contiguous."""
    q, k, v = qkv.unbind(1)
    dq, dk, dv = dqkv.unbind(1)
    _backward(grad, q, k, v, out, lse, dq, dk, dv, cu_seqlens, max_seqlen, scale)


_attention_backward = torch.library.custom_op("siglip2_packed::varlen_attention_backward", _gradients, mutates_args=())
_attention_qkvpacked_backward = torch.library.custom_op(
    "siglip2_packed::varlen_attention_qkvpacked_backward", gradients_qkvpacked, mutates_args=()
)


@_attention.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, scale):
    T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((H, T), dtype=torch.float32)


@_attention_backward.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


@_attention_qkvpacked.register_fake
def _(qkv, cu_seqlens, max_seqlen, scale):
    T, _, H, K = qkv.shape
    return qkv.new_empty((T, H, K)), qkv.new_empty((H, T), dtype=torch.float32)


@_attention_qkvpacked_backward.register_fake
def _(grad, qkv, out, lse, cu_seqlens, max_seqlen, scale):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.max_seqlen, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _attention_autograd(ctx, grad, _):
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    if grad is None:
        return (None,) * 6
    run = _attention_backward if traced() else _gradients
    gradients = run(grad, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale)
    return *gradients, None, None, None


def _attention_qkvpacked_autograd(ctx, grad, _):
    qkv, cu_seqlens, out, lse = ctx.saved_tensors
    if grad is None:
        return (None,) * 4
    run = _attention_qkvpacked_backward if traced() else gradients_qkvpacked
    return run(grad, qkv, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale), None, None, None


_attention.register_autograd(_attention_autograd, setup_context=_save)
_attention_qkvpacked.register_autograd(_attention_qkvpacked_autograd, setup_context=_save)


class _Attention(torch.autograd.Function):
    """The same without an operator's cost, which is that of several launches."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(once_differentiable(_attention_autograd))  # type: ignore[assignment]


class _AttentionQKVPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, *inputs):
        output = forward(*qkv.unbind(1), *inputs)
        _save(ctx, (qkv, *inputs), output)
        return output

    backward = staticmethod(once_differentiable(_attention_qkvpacked_autograd))  # type: ignore[assignment]


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`[T, H, K]` and the base-2 log-sum-exp `[H, T]` in float32."""
    T, H, K = q.shape
    S = cu_seqlens.shape[0] - 1
    out = torch.empty((T, H, K), dtype=q.dtype, device=q.device)
    lse = torch.empty((H, T), dtype=torch.float32, device=q.device)
    if T == 0:
        return out, lse
    q, k, v = map(aligned, (q, k, v))
    with device_of(q):
        few = few_rows(q, max_seqlen)
        hopper = hopper_kernels("attention_hopper") if capability(q) == 90 and not few else None
        if hopper and hopper.forward(q, k, v, out, lse, cu_seqlens, max_seqlen, scale * LOG2_E):
            return out, lse
        constants, options = forward_tile(K, q.dtype, max_seqlen, capability(q), few)
        blocks = max(1, ceil_div(max_seqlen, constants[0]))
        launch(
            kernels.forward_kernel,
            ((S + 1) * H * blocks, 1, 1),
            (q, k, v, out, lse, cu_seqlens),
            (scale * LOG2_E, T, S, blocks),
            (H, *strides(q, k, v, out), *lanes(K), *constants, precision(q.dtype)),
            **options,
        )
    return out, lse


def _backward(
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
    """Fills dq, dk and dv, which share strides."""
    T, H, K = q.shape
    S = cu_seqlens.shape[0] - 1
    if T == 0:
        return
    grad, q, k, v, out, lse = *map(aligned, (grad, q, k, v, out)), lse.contiguous()
    scales = scale, scale * LOG2_E
    with device_of(q):
        if tile := backward_short_tile(K, q.dtype, max_seqlen, capability(q)):
            constants, options = tile
            launch(
                kernels.backward_short_kernel,
                ((S + 1) * H, 1, 1),
                (q, k, v, grad, dq, dk, dv, lse, cu_seqlens),
                (*scales, T, S),
                (H, *strides(q, k, v, grad, dq), *lanes(K), *constants, precision(q.dtype)),
                **options,
            )
            return
        delta = torch.empty_like(lse)
        few = few_rows(q, max_seqlen)  # descriptors of tiles cost the host more than other kernels the device
        hopper = hopper_kernels("attention_hopper_backward") if capability(q) == 90 and not few else None
        if hopper and hopper.backward(grad, q, k, v, out, lse, delta, dq, dk, dv, cu_seqlens, max_seqlen, scale):
            return
        tile_q, tile_kv = backward_tiles(K, q.dtype, capability(q))
        constants, options = tile_q
        blocks = max(1, ceil_div(max_seqlen, constants[0]))
        launch(
            kernels.backward_q_kernel,
            ((S + 1) * H * blocks, 1, 1),
            (q, k, v, out, grad, dq, lse, delta, cu_seqlens),
            (*scales, T, S, blocks),
            (H, *strides(q, k, v, out, grad, dq), *lanes(K), *constants, precision(q.dtype)),
            **options,
        )
        constants, options = tile_kv
        blocks = max(1, ceil_div(max_seqlen, constants[1]))
        launch(
            kernels.backward_kv_kernel,
            ((S + 1) * H * blocks, 1, 1),
            (q, k, v, grad, dk, dv, lse, delta, cu_seqlens),
            (*scales, T, S, blocks),
            (H, *strides(q, k, v, grad, dk), *lanes(K), *constants, precision(q.dtype)),
            **options,
        )


@functools.cache
def lanes(K: int) -> tuple[int, int, int]:
    """K, and K cut in two powers of two, the second at most half the first and at least 16, or rounded up to one."""
    main = max(16, triton.next_power_of_2(K + 1) // 2)
    tail = max(16, triton.next_power_of_2(K - main)) if main < K else 0
    if tail > main // 2:
        main, tail = 2 * main, 0
    return K, main, tail


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


# Tiles: measured on an H100 at T = 16384, 16 heads, and frozen, because autotuning would stall a training run at every
# new shape. Elsewhere: tiles that fit 99 KB of shared memory. Loops need two stages or more: Triton 3.6 at one stage
# reads shared memory out of bounds. maxnreg buys a second or third resident block for a few spilled registers.


Tile = tuple[tuple[int, ...], dict[str, int]]  # constants of the kernel, options of its compilation


def few_rows(q: Tensor, max_seqlen: int) -> bool:
    """Whether larger blocks than of 64 queries would leave multiprocessors without work."""
    return max_seqlen <= 256 and q.shape[0] * q.shape[1] <= 128 * multiprocessors(q.device)


def forward_tile(K: int, dtype: torch.dtype, max_seqlen: int, capability: int, few: bool) -> Tile:
    """M queries, N keys, and whether all keys of a segment are one tile."""
    if dtype == torch.float32:
        return (32, 32, False), {"num_warps": 4, "num_stages": 2}
    if max_seqlen <= 128:
        return (64, 64 if max_seqlen <= 64 else 128, True), {"num_warps": 4, "num_stages": 1}
    if capability // 10 == 9 and K <= 80 and few:
        return (64, 64, False), {"num_warps": 4, "num_stages": 3}
    if capability // 10 == 9 and K <= 80:
        return (128, 64, False), {"num_warps": 8, "num_stages": 3, "maxnreg": 128}
    return (64, 64, False), {"num_warps": 4, "num_stages": 2}


def backward_short_tile(K: int, dtype: torch.dtype, max_seqlen: int, capability: int) -> Tile | None:
    """M rows: all of a segment."""
    if max_seqlen <= 32 or (max_seqlen <= 64 and dtype != torch.float32):
        return (32 if max_seqlen <= 32 else 64,), {"num_warps": 4, "num_stages": 1}
    if max_seqlen <= 128 and dtype != torch.float32 and capability // 10 == 9 and K <= 80:
        return (128,), {"num_warps": 8, "num_stages": 1}
    return None


def backward_tiles(K: int, dtype: torch.dtype, capability: int) -> tuple[Tile, Tile]:
    """M queries, N keys, for dq and for dk and dv."""
    if dtype == torch.float32:
        return ((32, 16), {"num_warps": 4, "num_stages": 2}), ((16, 32), {"num_warps": 4, "num_stages": 2})
    if capability // 10 == 9 and K <= 80:
        return (
            ((64, 32), {"num_warps": 4, "num_stages": 3, "maxnreg": 104}),
            ((32, 64), {"num_warps": 4, "num_stages": 3 if K <= 64 else 2, "maxnreg": 168}),
        )
    return ((64, 32), {"num_warps": 4, "num_stages": 2}), ((32, 64), {"num_warps": 4, "num_stages": 2})
