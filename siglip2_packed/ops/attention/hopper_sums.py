"""What `hopper_one_pass` has in memory besides: lse and delta by tiles of queries, and the sums that make dQ.

Shapes: T rows, S segments, H heads, K head_dim.

A tile is 64 queries of a head, the last one moved back to end with its segment. Tiles of a head are numbered: the i-th
of segment s, which begins at row t, is t // 64 + s + i.

Sums of a tile lie in the order of the registers of an accumulator: `[160, 32]`, 128 threads with 4 adjacent values
each, once for every 8 lanes: 64 lanes and a tail of 16, which are those of `hopper_tiles`. Lanes outside the head have
r, the sum of each row of dS. In exact arithmetic it is zero; what roundings make of it would be multiplied with all
that keys have in common, and is taken back.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.attention import low_order
from siglip2_packed.ops.attention.triton import lanes
from siglip2_packed.ops.attention.triton_kernels import _cut, _load, _place, _restored, _zero
from siglip2_packed.ops.runtime.launch import ceil_div, launch, outer_strides

ROWS = 160
"""Of a tile's sums, of 32."""
SAMPLE = tl.constexpr(64)
"""Keys of a segment, evenly spread, whose mean stands for all."""


@triton.jit
def _row_sums(
    out, low, grad, stride, low_stride, grad_stride, rows, left,
    LANES: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """sum(out * grad) of each row over a part's lanes."""
    x = _restored(out, low, stride, low_stride, rows, left, LANES, WIDTH, LOW)
    return tl.sum(x * _load(grad, grad_stride, rows, left, LANES, WIDTH).to(tl.float32), 1)


@triton.jit(do_not_specialize=["T", "S", "blocks", "tiles_of_head"])
def begin_kernel(
    k, out, low, grad, lse, cu_seqlens, statistics, means, added, T, S, blocks, tiles_of_head,
    H, skt, skh, sot, soh, sgt, sgh,
    K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """lse and delta of tiles, inf and 0 for rows that are another tile's; zero blocks added; a segment's mean key."""
    WIDTH: tl.constexpr = min(K, MAIN)
    skt, skh, sot, soh, sgt, sgh = skt * 8, skh * 8, sot * 8, soh * 8, sgt * 8, sgh * 8
    segment, head, block = _place(blocks, H)
    if segment == S:
        return
    first = tl.load(cu_seqlens + segment)
    length = tl.load(cu_seqlens + segment + 1) - first
    main, tail = _cut(head, K, MAIN, TAIL)
    out += main + head * soh
    low += main + head * K
    grad += main + head * sgh
    number = head * tiles_of_head + first // 64 + segment
    rows = tl.arange(0, 64)
    for start in range(block * 64, length, blocks * 64):
        moved = tl.maximum(tl.minimum(start, length - 64), 0)
        row = (first + moved).to(tl.int64)
        left = length - moved
        o, lo, g = out + row * sot, low + row * (H * K), grad + row * sgt
        delta = _row_sums(o, lo, g, sot, H * K, sgt, rows, left, MAIN, WIDTH, LOW)
        if TAIL > 0:
            delta += _row_sums(o + tail, lo + tail, g + tail, sot, H * K, sgt, rows, left, TAIL, K - MAIN, LOW)
        own = (rows >= start - moved) & (rows < left)
        e = tl.load(lse + head * T + row + rows, mask=own, other=float("inf"))
        tile = number + start // 64
        tl.store(statistics + tile * 128 + rows, e)
        tl.store(statistics + tile * 128 + 64 + rows, tl.where(own, delta, 0.0))
        tl.store(added + tile, 0)
    if block == 0:
        k += main + head * skh + first.to(tl.int64) * skt
        means += (segment * H + head) * K + main
        sample = tl.arange(0, SAMPLE).to(tl.int64) * length // SAMPLE
        mean = tl.sum(_load(k, skt, sample, length, MAIN, WIDTH).to(tl.float32), 0) / SAMPLE
        tl.store(means + tl.arange(0, MAIN), mean, mask=tl.arange(0, MAIN) < WIDTH)
        if TAIL > 0:
            mean = tl.sum(_load(k + tail, skt, sample, length, TAIL, K - MAIN).to(tl.float32), 0) / SAMPLE
            tl.store(means + tail + tl.arange(0, TAIL), mean, mask=tl.arange(0, TAIL) < K - MAIN)


@triton.jit
def _sums(sums, LANES: tl.constexpr):
    """Of a part, [64, LANES], from the order of the registers."""
    x = tl.load(sums + tl.arange(0, 64 * LANES))
    x = tl.permute(tl.reshape(x, [LANES // 8, 4, 4, 2, 4, 2, 2]), [1, 5, 2, 3, 0, 4, 6])
    return tl.reshape(x, [64, LANES])


@triton.jit(do_not_specialize=["T", "S", "blocks", "tiles_of_head"])
def store_kernel(
    sums, means, dq, cu_seqlens, scale, T, S, blocks, tiles_of_head,
    H, sdt, sdh, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dq of tiles, or zeros beyond the last segment."""
    sdt, sdh = sdt * 8, sdh * 8
    segment, head, block = _place(blocks, H)
    first = tl.load(cu_seqlens + segment)
    start = block * 64
    if segment == S:
        _zero(dq + head * sdh, sdt, first + start, T, blocks * 64, K, 128, 64)
        return
    length = tl.load(cu_seqlens + segment + 1) - first
    rows = tl.arange(0, 64)
    main = tl.arange(0, 64) + head % 2 * (K - 64)  # lanes, as `hopper_tiles` cuts them
    tail = tl.arange(0, 16) + (64 - head % 2 * ((K - 64) // 8 * K))
    in_head = (tail >= 0) & (tail < K)
    sums += (head * tiles_of_head + first // 64 + segment) * (ROWS * 32)
    means += (segment * H + head) * K
    dq += head * sdh
    for start in range(block * 64, length, blocks * 64):
        moved = tl.maximum(tl.minimum(start, length - 64), 0)
        own = (rows >= start - moved) & (rows < length - moved)
        here = sums + tl.cast(start // 64, tl.int64) * (ROWS * 32)
        of_tail = _sums(here + 128 * 32, 16)
        r = tl.sum(tl.where(in_head[None, :], 0.0, of_tail), 1) / (80 - K)
        of_main = _sums(here, 64) - r[:, None] * tl.load(means + main)[None, :]
        at = dq + (first + moved + rows[:, None]).to(tl.int64) * sdt
        tl.store(at + main[None, :], (of_main * scale).to(dq.dtype.element_ty), mask=own[:, None])
        if K > 64:
            of_tail -= r[:, None] * tl.load(means + tail, mask=in_head, other=0.0)[None, :]
            tl.store(
                at + tail[None, :], (of_tail * scale).to(dq.dtype.element_ty), mask=own[:, None] & in_head[None, :]
            )


class Sums(NamedTuple):
    """
    Attributes:
        sums: `[H * tiles_of_head * 160, 32]`, not yet filled.
        statistics: `[H * tiles_of_head * 128]`, lse and delta of 64 queries each.
        added: `[H * tiles_of_head]` int32, the blocks of keys whose part of a tile is there.
        means: `[S, H, K]`, of keys.
    """

    sums: Tensor
    statistics: Tensor
    added: Tensor
    means: Tensor
    tiles_of_head: int
    cu_seqlens: Tensor
    blocks: int

    def store(self, dq: Tensor, scale: float) -> None:
        """dq `[T, H, K]` from the sums that are there now."""
        (T, H, K), S = dq.shape, len(self.cu_seqlens) - 1
        launch(
            store_kernel,
            ((S + 1) * H * self.blocks, 1, 1),
            (self.sums, self.means, dq, self.cu_seqlens),
            (scale, T, S, self.blocks, self.tiles_of_head),
            (H, *outer_strides(dq), K, ROWS),
            num_warps=2,
        )


def begin(
    grad: Tensor, k: Tensor, out: Tensor, low: Tensor | None, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Sums:
    """Memory for the sums of a pack, and what is known before."""
    (T, H, K), S, shift = out.shape, len(cu_seqlens) - 1, low_order.shift(out, low)
    low = out if low is None else low.contiguous()
    tiles_of_head, blocks = T // 64 + S + 1, max(1, ceil_div(max_seqlen, 64))
    tiles = H * tiles_of_head
    sums, statistics = lse.new_empty((tiles * ROWS, 32)), lse.new_empty(tiles * 128)
    added, means = cu_seqlens.new_empty(tiles), lse.new_empty((S, H, K))
    launch(
        begin_kernel,
        ((S + 1) * H * blocks, 1, 1),
        (k, out, low, grad, lse, cu_seqlens, statistics, means, added),
        (T, S, blocks, tiles_of_head),
        (H, *outer_strides(k, out, grad), *lanes(K), shift),
        num_warps=8,
    )
    return Sums(sums, statistics, added, means, tiles_of_head, cu_seqlens, blocks)
