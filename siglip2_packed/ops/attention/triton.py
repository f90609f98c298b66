"""Launches of the Triton attention kernels.

Made for SigLIP2: head_dim 64 and 72, segments of 64 to 1024 patches, where the time is that of reading and writing the
tensors. One launch for any mix of lengths, no copy of strided inputs, no device-to-host copy.

Shapes: T rows, S segments, H heads, K head_dim. Everything is deterministic.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from siglip2_packed.ops.attention import low_order
from siglip2_packed.ops.attention import triton_kernels as kernels
from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.runtime.choice import Tile
from siglip2_packed.ops.runtime.launch import ceil_div, launch, outer_strides, readable


def forward(
    tile: Tile,
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
    """Fills out `[T, H, K]`, contiguous, and the base-2 log-sum-exp `[H, T]` in float32; and `low`, if it is kept."""
    (T, H, K), S = q.shape, cu_seqlens.shape[0] - 1
    q, k, v = readable(q, k, v)
    blocks, shift = max(1, ceil_div(max_seqlen, tile.M)), low_order.shift(out, low)
    launch(
        kernels.forward_kernel,
        ((S + 1) * H * blocks, 1, 1),
        (q, k, v, out, out if low is None else low, lse, cu_seqlens),
        (scale * LOG2_E, T, S, blocks),
        (H, *outer_strides(q, k, v, out), *lanes(K), tile.M, tile.N, tile.single, shift, _precision(q.dtype)),
        **_options(tile),
    )


def backward_short(
    tile: Tile,
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
    """Fills dq, dk and dv, which share strides, for segments of at most M rows: one tile each."""
    (T, H, K), S = q.shape, cu_seqlens.shape[0] - 1
    grad, q, k, v = readable(grad, q, k, v)
    launch(
        kernels.backward_short_kernel,
        ((S + 1) * H, 1, 1),
        (q, k, v, grad, dq, dk, dv, lse, cu_seqlens),
        (scale, scale * LOG2_E, T, S),
        (H, *outer_strides(q, k, v, grad, dq), *lanes(K), tile.M, _precision(q.dtype)),
        **_options(tile),
    )


def backward(
    tiles: tuple[Tile, Tile],
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
    """Fills dq, then dk and dv, which share strides."""
    (T, H, K), S = q.shape, cu_seqlens.shape[0] - 1
    grad, q, k, v, out = readable(grad, q, k, v, out)
    delta, scales, shift = torch.empty_like(lse), (scale, scale * LOG2_E), low_order.shift(out, low)
    low = out if low is None else low.contiguous()
    of_q, of_kv = tiles
    blocks = max(1, ceil_div(max_seqlen, of_q.M))
    launch(
        kernels.backward_q_kernel,
        ((S + 1) * H * blocks, 1, 1),
        (q, k, v, out, low, grad, dq, lse, delta, cu_seqlens),
        (*scales, T, S, blocks),
        (H, *outer_strides(q, k, v, out, grad, dq), *lanes(K), of_q.M, of_q.N, shift, _precision(q.dtype)),
        **_options(of_q),
    )
    blocks = max(1, ceil_div(max_seqlen, of_kv.N))
    launch(
        kernels.backward_kv_kernel,
        ((S + 1) * H * blocks, 1, 1),
        (q, k, v, grad, dk, dv, lse, delta, cu_seqlens),
        (*scales, T, S, blocks),
        (H, *outer_strides(q, k, v, grad, dk), *lanes(K), of_kv.M, of_kv.N, _precision(q.dtype)),
        **_options(of_kv),
    )


@functools.cache
def lanes(K: int) -> tuple[int, int, int]:
    """K, and K cut in two powers of two, the second at most half the first and at least 16, or rounded up to one."""
    main = max(16, triton.next_power_of_2(K + 1) // 2)
    tail = max(16, triton.next_power_of_2(K - main)) if main < K else 0
    if tail > main // 2:
        main, tail = 2 * main, 0
    return K, main, tail


@functools.cache
def _options(tile: Tile) -> dict[str, int]:
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return options if tile.registers is None else options | {"maxnreg": tile.registers}


@functools.cache
def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
