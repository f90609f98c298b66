"""The attention's backward on Hopper (compute capability 9.0), in Gluon, for head_dim 64 and 72.

Shapes: T rows, S segments, H heads, K head_dim.

Two kernels, seven products, no sums by atomics: every result is deterministic. Where segments are long on the whole,
`hopper_one_pass` takes their place: five products, deterministic too, but work before and after.

    backward_q   64 * WGS queries of a head, one key tile after another: S = Q kT, dP = dO vT, dQ += dS K
    backward_kv  64 keys of a head, one query tile after another: sT = K qT, dpT = V doT, dV += pT dO, dK += dsT Q

with P = exp2(S * scale_log2 - lse), dS = P * (dP - delta), and delta = sum(P * dP), found by the first.

As in the forward, thread blocks stay resident and draw items, long segments first; one warp (the producer) brings tiles
through the copy engine (TMA), running ahead into the next item, and warpgroups of 64 rows (the consumers) compute. They
are told of an item before its tiles are there, to load lse and delta meanwhile. A product is issued before the previous
results are used, so that the tensor cores work while the exponentials are taken.

The last tile of those that are summed over is moved back to end with the segment, and rows seen twice are switched off
(dS = 0 for keys, lse = inf for queries): no row of another segment enters a sum. Segments shorter than a tile zero the
rows behind them in shared memory, because 0 * NaN is NaN. Rows beyond the segment on the other side do not mix with its
own, and are not stored.
"""

import torch
from torch import Tensor

from siglip2_packed.ops.attention import low_order
from siglip2_packed.ops.attention.hopper_backward_kv import backward_kv
from siglip2_packed.ops.attention.hopper_backward_q import backward_q
from siglip2_packed.ops.attention.hopper_items import work_counter
from siglip2_packed.ops.attention.hopper_tiles import TILES, with_tails
from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.runtime.hopper import Launcher, in_reach
from siglip2_packed.ops.runtime.launch import ceil_div, multiprocessors

# WGS: stages (K = 64: four more), registers of consumers and of the launch; a thread block a multiprocessor
RESOURCES_Q = {2: (12, 240, 168), 3: (10, 160, 128)}
# stages, each of a pair of tiles (K = 64: one more), registers of the launch, thread blocks a multiprocessor
RESOURCES_KV = 4, 128, 2


def backward(
    WGS: int,
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
    """Fills dq, WGS * 64 queries at a time, then dk and dv. The three share strides; their heads lie side by side."""
    grad, q, k, v, out = in_reach(grad, q, k, v, out)
    shift = low_order.shift(out, low)
    low = None if low is None else in_reach(low.contiguous())[0]
    T, H, K = q.shape
    S, delta, (counters, slot) = len(cu_seqlens) - 1, torch.empty_like(lse), work_counter(q.device)
    (stages_q, registers, of_launch), (stages_kv, of_launch_kv, resident) = RESOURCES_Q[WGS], RESOURCES_KV
    common = lse, delta, cu_seqlens, counters, scale, scale * LOG2_E, T, S
    strides = dq.stride()[:2]
    more = K == 64
    # the second kernel begins after the first's end, so they share a work counter
    numbers_q = ceil_div(max_seqlen, 64 * WGS), slot, *strides, H, K, WGS, stages_q + 4 * more, registers, shift
    numbers_kv = H, ceil_div(max_seqlen, 64), slot, *strides, K, stages_kv + more
    of_q = *with_tails(q, k, v, out, grad), low, dq, *common, *numbers_q
    of_kv = *with_tails(q, k, v, grad), dk, dv, *common, *numbers_kv
    key = q.device, q.dtype, *strides, H, K, WGS, shift
    launchers = _launchers.get(key)
    if launchers is None:
        launchers = _launchers[key] = (
            Launcher(backward_q, of_q, TILES * 5, num_warps=4, maxnreg=of_launch),
            Launcher(backward_kv, of_kv, TILES * 4, num_warps=4, maxnreg=of_launch_kv),
        )
    items_q, items_kv = H * (T // (64 * WGS) + S), H * (T // 64 + S)  # at most
    blocks = multiprocessors(q.device)
    launchers[0]((max(1, min(items_q, blocks)), 1, 1), of_q)
    launchers[1]((max(1, min(items_kv, resident * blocks)), 1, 1), of_kv)


_launchers: dict[tuple, tuple[Launcher, Launcher]] = {}
