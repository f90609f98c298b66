"""The attention's backward on Hopper (compute capability 9.0), in Gluon, for head_dim 64 and 72.

Shapes: T rows, S segments, H heads, K head_dim.

Two kernels, seven products, no sums by atomics: every result is deterministic.

    backward_q   64 * WGS queries of a head, one key tile after another: S = Q kT, dP = dO vT, dQ += dS K
    backward_kv  64 keys of a head, one query tile after another: sT = K qT, dpT = V doT, dV += pT dO, dK += dsT Q

with P = exp2(S * scale_log2 - lse), dS = P * (dP - delta), and delta = sum(P * dP). The first kernel begins with
sum(out * dO), which is that delta but for roundings: of `out`, whose low-order part the forward kept (`low_order`),
and of P before it was multiplied with V. What it lacks is r = sum(dS): that is added to the delta that the second
reads, and taken from dS evenly over the last tile's keys, so that dQ does not get r times all that keys have in common.

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
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from siglip2_packed.ops.attention import low_order
from siglip2_packed.ops.attention.hopper_items import (
    ACC,
    ACC_TAIL,
    ROWS,
    ROWS_TAIL,
    TILE,
    TILE_TAIL,
    TILES,
    cut,
    read,
    restored,
    tell,
    walk,
    with_tails,
    work_counter,
    write,
)
from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.runtime.hopper import Launcher, barrier, copy, in_reach
from siglip2_packed.ops.runtime.launch import ceil_div, multiprocessors

# WGS: tiles in flight (K = 64: four more), registers of consumers and of the launch; a thread block a multiprocessor
RESOURCES_Q = {2: (12, 240, 168), 3: (10, 160, 128)}
# pairs of tiles in flight (K = 64: one more), registers of the launch, thread blocks a multiprocessor
RESOURCES_KV = 4, 128, 2
PRODUCER_REGISTERS = gl.constexpr(24)

ZEROS = gl.constexpr(gl.BlockedLayout([8], [32], [1], [0]))
FLAT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
STATISTICS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _at(start, length):
    """First row of the tile of 64 that begins at `start`, moved back to end within the segment."""
    return gl.maximum(gl.minimum(start, length - 64), 0)


@gluon.jit
def _copy(main, tail, row, head, lane, lane_tail, bar, to_main, to_tail, pred, K: gl.constexpr):
    copy(main, [row, head, lane], bar, to_main, pred=pred)
    if K > 64:
        copy(tail, [row, head, lane_tail], bar, to_tail, pred=pred)


@gluon.jit
def _main(ring, i):
    return ring.index(i).reshape([64, 64])


@gluon.jit
def _tail(ring, i, K: gl.constexpr):
    return ring.index(i).reshape([64, 16 if K > 64 else 64])  # at K = 64 there is none, nor is it used


@gluon.jit
def _zero_rows(tile, length, LAYOUT: gl.constexpr):
    """Zeros behind the segment's rows: those of another segment are perhaps NaN."""
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    tile.store(gl.where((rows < length)[:, None], tile.load(LAYOUT), 0.0))


@gluon.jit
def _zero_beyond(x, sxt: gl.constexpr, lanes, first, T):
    """Zeros in rows [first, T): a thread block's part, by one warp."""
    here = gl.arange(0, 256, ZEROS)
    for row in range(first + gl.program_id(0), T, gl.num_programs(0)):
        for lane in range(0, lanes, 256):
            at = x + gl.cast(row, gl.int64) * sxt + lane + here
            gl.store(at, gl.zeros([256], x.dtype.element_ty, ZEROS), mask=here < lanes - lane)


@gluon.jit
def _next(message, item_full, turn):
    """Length of the segment of a new item, 0 behind the last."""
    mbarrier.wait(item_full.index(turn % 2), turn // 2 & 1)
    return read(message, turn % 2 * 4 + 1)


@gluon.jit
def _item(message, turn):
    """The segment's first row, the head, and the item's row in the segment."""
    at = turn % 2 * 4
    return read(message, at), read(message, at + 2), read(message, at + 3)


@gluon.jit
def _stop(message, item_full, turn):
    write(message, turn % 2 * 4 + 1, 0)
    barrier()
    mbarrier.arrive(item_full.index(turn % 2), count=1)


@gluon.jit
def _product(a, a_tail, ring, ring_tail, i, K: gl.constexpr):
    """Issues a ring[i]^T."""
    zero = gl.zeros([64, 64], gl.float32, ACC)
    x = warpgroup_mma(a, _main(ring, i).permute((1, 0)), zero, use_acc=False, is_async=True)
    if K > 64:
        x = warpgroup_mma(a_tail, _tail(ring_tail, i, K).permute((1, 0)), x, is_async=True)
    return x


@gluon.jit
def _accumulate(ds, main, tail, slot, acc, acc_t, K: gl.constexpr):
    """Issues acc + ds K. The last two results are for the wait: they keep ds in its registers until then."""
    ds_m = gl.convert_layout(ds, gl.DotOperandLayout(0, ACC, 2))
    ds_t = gl.convert_layout(ds, gl.DotOperandLayout(0, ACC_TAIL, 2))
    acc = warpgroup_mma(ds_m, _main(main, slot), acc, is_async=True)
    if K > 64:
        acc_t = warpgroup_mma(ds_t, _tail(tail, slot, K), acc_t, is_async=True)
    return acc, acc_t, ds_m, ds_t


@gluon.jit
def _low_tile(ptr, stride, limit, begin, end, LAYOUT: gl.constexpr):
    """Bytes of the output's low part: zeros for rows >= limit and lanes outside [begin, end)."""
    LANES: gl.constexpr = 64 if LAYOUT == ROWS else 16
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    lanes = gl.arange(0, LANES, gl.SliceLayout(0, LAYOUT))
    real = (rows < limit)[:, None] & ((lanes >= begin) & (lanes < end))[None, :]
    return gl.load(ptr + rows[:, None] * stride + lanes[None, :], mask=real, other=0)


@gluon.jit
def _row_sums(out, low, grad, LAYOUT: gl.constexpr, LOW: gl.constexpr):
    """sum(out * grad) of each row of two tiles in shared memory."""
    x = restored(out.load(LAYOUT), low, LOW)
    return gl.convert_layout(gl.sum(x * grad.load(LAYOUT).to(gl.float32), 1), gl.SliceLayout(1, ACC))


@gluon.jit
def _save(x, x_tail, stage, stage_tail, ptr, sxt: gl.constexpr, lane, lane_tail, left, K: gl.constexpr):
    """Stores a tile's first `left` rows, through shared memory in 16-byte pieces."""
    stage.store(x.to(ptr.dtype.element_ty))
    if K > 64:
        stage_tail.store(x_tail.to(ptr.dtype.element_ty))
    rows = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    lanes = gl.arange(0, 64, gl.SliceLayout(0, ROWS))
    gl.store(ptr + rows[:, None] * sxt + lane + lanes[None, :], stage.load(ROWS), mask=(rows < left)[:, None])
    if K > 64:
        rows = gl.arange(0, 64, gl.SliceLayout(1, ROWS_TAIL))
        lanes = lane_tail + gl.arange(0, 16, gl.SliceLayout(0, ROWS_TAIL))
        real = (rows < left)[:, None] & ((lanes >= 0) & (lanes < K))[None, :]
        gl.store(ptr + rows[:, None] * sxt + lanes[None, :], stage_tail.load(ROWS_TAIL), mask=real)


@gluon.jit
def _bring_q(
    source, tiles, bars, first, length, head, row, turn, count,
    K: gl.constexpr, WGS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Brings Q and dO of an item, then through the ring `out`, and K and V in turn."""
    q, q_t, k, k_t, v, v_t, out, out_t, grad, grad_t = source
    q_main, q_tail, g_main, g_tail, main, tail, message = tiles
    item_full, q_full, q_empty, full, empty = bars
    BYTES: gl.constexpr = 64 * 2 * (80 if K > 64 else 64)
    lane, lane_tail = cut(head, K)
    for w in gl.static_range(WGS):
        mbarrier.wait(q_empty.index(turn % 2 + w * 2), (turn // 2 & 1) ^ 1)
    tell(message, turn % 2, first, length, head, row)
    mbarrier.arrive(item_full.index(turn % 2), count=1)
    for w in gl.static_range(WGS):
        buf = turn % 2 + w * 2
        bar = q_full.index(buf)
        active = row + 64 * w < length
        at = first + row + 64 * w
        mbarrier.expect(bar, 2 * BYTES, pred=active)
        _copy(q, q_t, at, head, lane, lane_tail, bar, q_main.index(buf), q_tail.index(buf), active, K)
        _copy(grad, grad_t, at, head, lane, lane_tail, bar, g_main.index(buf), g_tail.index(buf), active, K)
        mbarrier.arrive(bar, count=1, pred=row + 64 * w >= length)
    for r in range(row, gl.minimum(length, row + 64 * WGS), 64):
        slot = count % SLOTS
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), (count // SLOTS & 1) ^ 1)
        mbarrier.expect(bar, BYTES)
        _copy(out, out_t, first + r, head, lane, lane_tail, bar, main.index(slot), tail.index(slot), True, K)
        count += 1
    for start in range(0, length, 64):
        at = first + _at(start, length)
        slot = count % SLOTS
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), (count // SLOTS & 1) ^ 1)
        mbarrier.expect(bar, BYTES)
        _copy(k, k_t, at, head, lane, lane_tail, bar, main.index(slot), tail.index(slot), True, K)
        count += 1
        slot = count % SLOTS
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), (count // SLOTS & 1) ^ 1)
        mbarrier.expect(bar, BYTES)
        _copy(v, v_t, at, head, lane, lane_tail, bar, main.index(slot), tail.index(slot), True, K)
        count += 1
    return count


@gluon.jit
def _q_producer(
    source, tiles, bars, work, dq, T, sdt: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr, SLOTS: gl.constexpr
):
    cu_seqlens, counter, S, H, blocks = work
    item_full, _, q_empty, _, _ = bars
    turn = walk(_bring_q, source, tiles, bars, cu_seqlens, counter, S, H, blocks, K, WGS, SLOTS)
    for w in gl.static_range(WGS):
        mbarrier.wait(q_empty.index(turn % 2 + w * 2), (turn // 2 & 1) ^ 1)
    _stop(tiles[-1], item_full, turn)
    _zero_beyond(dq, sdt, H * K, gl.load(cu_seqlens + S), T)


@gluon.jit
def _q_consumer(
    W: gl.constexpr, pack, tiles, bars, sdt: gl.constexpr, sdh: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr,
    H: gl.constexpr, SLOTS: gl.constexpr, LOW: gl.constexpr,
):  # fmt: skip
    """Rows 64 W to 64 W + 63 of every item."""
    low, dq, lse, delta, scale, scale_log2, T = pack
    q_main, q_tail, g_main, g_tail, main, tail, message = tiles
    item_full, q_full, q_empty, full, empty = bars
    TAIL: gl.constexpr = K > 64
    DTYPE: gl.constexpr = dq.dtype.element_ty
    OF_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    count = 0
    turn = 0
    length = _next(message, item_full, turn)
    while length > 0:
        first, head, row = _item(message, turn)
        left = length - row - 64 * W
        count_tiles = (length + 63) // 64
        buf = turn % 2 + W * 2
        if left > 0:
            rows = gl.arange(0, 64, OF_ROW)
            place = head.to(gl.int64) * T + first + row + 64 * W
            e = gl.load(lse + place + rows, mask=rows < left, other=0.0)
            low_main = 0
            low_tail = 0
            if LOW > 0:
                at = low + ((first + row + 64 * W).to(gl.int64) * H + head) * K
                lane, lane_tail = cut(head, K)
                low_main = _low_tile(at + lane, H * K, left, 0, 64, ROWS)
                if TAIL:
                    low_tail = _low_tile(at + lane_tail, H * K, left, -lane_tail, K - lane_tail, ROWS_TAIL)
            mbarrier.wait(q_full.index(buf), turn // 2 & 1)
            q = _main(q_main, buf)
            g = _main(g_main, buf)
            qt = _tail(q_tail, buf, K)
            gt = _tail(g_tail, buf, K)
            for w in gl.static_range(WGS):
                if w != W:  # noqa: SIM102 (the outer is decided at compile time)
                    if row + 64 * w < length:  # a tile of `out` that is another warpgroup's
                        mbarrier.wait(full.index((count + w) % SLOTS), (count + w) // SLOTS & 1)
                        mbarrier.arrive(empty.index((count + w) % SLOTS), count=1)
            slot = (count + W) % SLOTS
            mbarrier.wait(full.index(slot), (count + W) // SLOTS & 1)
            d = _row_sums(_main(main, slot), low_main, g, ROWS, LOW)
            if TAIL:
                d += _row_sums(_tail(tail, slot, K), low_tail, gt, ROWS_TAIL, LOW)
            fence_async_shared()  # reads by load, unlike those of products, may still be under way at the barrier
            mbarrier.arrive(empty.index(slot), count=1)
            count += gl.minimum((length - row + 63) // 64, WGS)
            slot = count % SLOTS
            mbarrier.wait(full.index(slot), count // SLOTS & 1)
            if length < 64:
                _zero_rows(_main(main, slot), length, ROWS)
                if TAIL:
                    _zero_rows(_tail(tail, slot, K), length, ROWS_TAIL)
                fence_async_shared()
                barrier()
            acc = gl.zeros([64, 64], gl.float32, ACC)
            acc_t = gl.zeros([64, 16], gl.float32, ACC_TAIL)
            r = gl.zeros([64], gl.float32, OF_ROW)
            s = warpgroup_mma_wait(0, [_product(q, qt, main, tail, slot, K)])
            p = gl.exp2(s * scale_log2 - e[:, None])
            for _ in range(1, count_tiles):
                ks = count % SLOTS
                vs = (count + 1) % SLOTS
                ns = (count + 2) % SLOTS
                mbarrier.wait(full.index(vs), (count + 1) // SLOTS & 1)
                dp_a = _product(g, gt, main, tail, vs, K)
                mbarrier.wait(full.index(ns), (count + 2) // SLOTS & 1)
                s_a = _product(q, qt, main, tail, ns, K)
                dp = warpgroup_mma_wait(2 if TAIL else 1, [dp_a])
                ds = p * (dp - d[:, None])
                r += gl.sum(ds, 1)
                ds = ds.to(DTYPE)
                acc_a, acc_ta, ds_m, ds_t = _accumulate(ds, main, tail, ks, acc, acc_t, K)
                s = warpgroup_mma_wait(2 if TAIL else 1, [s_a])
                mbarrier.arrive(empty.index(vs), count=1)
                p = gl.exp2(s * scale_log2 - e[:, None])
                if TAIL:
                    acc, acc_t, ds_m, ds_t = warpgroup_mma_wait(0, [acc_a, acc_ta, ds_m, ds_t])
                else:
                    acc, ds_m = warpgroup_mma_wait(0, [acc_a, ds_m])
                mbarrier.arrive(empty.index(ks), count=1)
                count += 2
            ks = count % SLOTS
            vs = (count + 1) % SLOTS
            mbarrier.wait(full.index(vs), (count + 1) // SLOTS & 1)
            dp = warpgroup_mma_wait(0, [_product(g, gt, main, tail, vs, K)])
            mbarrier.arrive(empty.index(vs), count=1)
            ds = p * (dp - d[:, None])
            if count_tiles * 64 > length:  # keys of the tile before (in front) or another segment (behind)
                start = count_tiles * 64 - 64
                keys = _at(start, length) + gl.arange(0, 64, gl.SliceLayout(0, ACC))
                ds = gl.where(((keys >= start) & (keys < length))[None, :], ds, 0.0)
            r += gl.sum(ds, 1)
            ds = (ds - (r / gl.minimum(length, 64))[:, None]).to(DTYPE)
            acc_a, acc_ta, ds_m, ds_t = _accumulate(ds, main, tail, ks, acc, acc_t, K)
            if TAIL:
                acc, acc_t, ds_m, ds_t = warpgroup_mma_wait(0, [acc_a, acc_ta, ds_m, ds_t])
            else:
                acc, ds_m = warpgroup_mma_wait(0, [acc_a, ds_m])
            mbarrier.arrive(empty.index(ks), count=1)
            count += 2
            first, head, row = _item(message, turn)  # again: the loop has no registers for them
            left = length - row - 64 * W
            rows = gl.arange(0, 64, OF_ROW)
            gl.store(delta + head.to(gl.int64) * T + first + row + 64 * W + rows, d + r, mask=rows < left)
            lane, lane_tail = cut(head, K)
            ptr = dq + head.to(gl.int64) * sdh + (first + row + 64 * W).to(gl.int64) * sdt
            _save(acc * scale, acc_t * scale, q, qt, ptr, sdt, lane, lane_tail, left, K)
            fence_async_shared()
            mbarrier.arrive(q_empty.index(buf), count=1)
        else:
            mbarrier.wait(q_full.index(buf), turn // 2 & 1)
            for _ in range(0, 2 * count_tiles + (length - row + 63) // 64):
                mbarrier.wait(full.index(count % SLOTS), count // SLOTS & 1)
                mbarrier.arrive(empty.index(count % SLOTS), count=1)
                count += 1
            mbarrier.arrive(q_empty.index(buf), count=1)
        turn += 1
        length = _next(message, item_full, turn)


@gluon.jit(do_not_specialize=["T", "S", "blocks", "slot"], do_not_specialize_on_alignment=["lse", "cu_seqlens"])
def backward_q(
    q, q_t, k, k_t, v, v_t, out, out_t, grad, grad_t, low, dq, lse, delta, cu_seqlens, counters, scale,
    scale_log2, T, S, blocks, slot,
    sdt: gl.constexpr, sdh: gl.constexpr, H: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr, SLOTS: gl.constexpr,
    REGISTERS: gl.constexpr, LOW: gl.constexpr,
):  # fmt: skip
    """dq, of strides (sdt, sdh, 1), and delta `[H, T]` of all rows within segments, which backward_kv reads.

    q, k, v, out, grad are descriptors of [T, H, K] with boxes [64, 1, 64], their tails with [64, 1, 16], or None at
    K = 64. low: contiguous, or None where LOW, the shift of `low_order`, is 0. blocks: those of max_seqlen rows. The
    work counter `counters[slot]` is zero before and after.
    """
    DTYPE: gl.constexpr = dq.dtype.element_ty
    q_main = gl.allocate_shared_memory(DTYPE, [2 * WGS, 64, 1, 64], TILE)
    g_main = gl.allocate_shared_memory(DTYPE, [2 * WGS, 64, 1, 64], TILE)
    main = gl.allocate_shared_memory(DTYPE, [SLOTS, 64, 1, 64], TILE)
    q_tail = q_main
    g_tail = g_main
    tail = main
    if K > 64:
        q_tail = gl.allocate_shared_memory(DTYPE, [2 * WGS, 64, 1, 16], TILE_TAIL)
        g_tail = gl.allocate_shared_memory(DTYPE, [2 * WGS, 64, 1, 16], TILE_TAIL)
        tail = gl.allocate_shared_memory(DTYPE, [SLOTS, 64, 1, 16], TILE_TAIL)
    message = gl.allocate_shared_memory(gl.int32, [8, 1], STATISTICS)
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2 * WGS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * WGS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(item_full.index(i), count=1)
    for i in gl.static_range(2 * WGS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WGS)
    fence_async_shared()
    tiles = (q_main, q_tail, g_main, g_tail, main, tail, message)
    bars = (item_full, q_full, q_empty, full, empty)
    pack = (low, dq, lse, delta, scale, scale_log2, T)
    source = (q, q_t, k, k_t, v, v_t, out, out_t, grad, grad_t)
    work = (cu_seqlens, counters + slot, S, H, blocks)
    if WGS == 2:
        gl.warp_specialize(
            [
                (_q_consumer, (0, pack, tiles, bars, sdt, sdh, K, WGS, H, SLOTS, LOW)),
                (_q_consumer, (1, pack, tiles, bars, sdt, sdh, K, WGS, H, SLOTS, LOW)),
                (_q_producer, (source, tiles, bars, work, dq, T, sdt, K, WGS, SLOTS)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_q_consumer, (0, pack, tiles, bars, sdt, sdh, K, WGS, H, SLOTS, LOW)),
                (_q_consumer, (1, pack, tiles, bars, sdt, sdh, K, WGS, H, SLOTS, LOW)),
                (_q_consumer, (2, pack, tiles, bars, sdt, sdh, K, WGS, H, SLOTS, LOW)),
                (_q_producer, (source, tiles, bars, work, dq, T, sdt, K, WGS, SLOTS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )


@gluon.jit
def _bring_kv(
    source, tiles, bars, first, length, head, row, turn, count,
    K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings K and V of an item, then pairs of Q and dO."""
    q, q_t, k, k_t, v, v_t, grad, grad_t = source
    k_main, k_tail, v_main, v_tail, q_main, q_tail, g_main, g_tail, message = tiles
    item_full, kv_full, kv_empty, full, empty = bars
    BYTES: gl.constexpr = 64 * 2 * (80 if K > 64 else 64)
    lane, lane_tail = cut(head, K)
    # the place is free: K and V of its item, two turns ago, were released before those of the last one came
    tell(message, turn % 2, first, length, head, row)
    mbarrier.arrive(item_full.index(turn % 2), count=1)
    bar = kv_full.index(0)
    at = first + row
    mbarrier.wait(kv_empty.index(0), (turn & 1) ^ 1)
    mbarrier.expect(bar, 2 * BYTES)
    _copy(k, k_t, at, head, lane, lane_tail, bar, k_main.index(0), k_tail.index(0), True, K)
    _copy(v, v_t, at, head, lane, lane_tail, bar, v_main.index(0), v_tail.index(0), True, K)
    for start in range(0, length, 64):
        at = first + _at(start, length)
        stage = count % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
        mbarrier.expect(bar, 2 * BYTES)
        _copy(q, q_t, at, head, lane, lane_tail, bar, q_main.index(stage), q_tail.index(stage), True, K)
        _copy(grad, grad_t, at, head, lane, lane_tail, bar, g_main.index(stage), g_tail.index(stage), True, K)
        count += 1
    return count


@gluon.jit
def _kv_producer(source, tiles, bars, work, dk, dv, T, sdt: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr):
    cu_seqlens, counter, S, H, blocks = work
    turn = walk(_bring_kv, source, tiles, bars, cu_seqlens, counter, S, H, blocks, K, 1, STAGES)
    _stop(tiles[-1], bars[0], turn)
    last = gl.load(cu_seqlens + S)
    _zero_beyond(dk, sdt, H * K, last, T)
    _zero_beyond(dv, sdt, H * K, last, T)


@gluon.jit
def _statistic(ptr, query, length, other):
    """lse or delta of the tile of queries that belongs to `query`; `other` for queries of another tile or segment."""
    rows = _at(query, length) + gl.arange(0, 64, FLAT)
    return gl.load(ptr + rows, mask=(rows >= query) & (rows < length), other=other)


@gluon.jit
def _kv_consumer(
    pack, tiles, statistics, bars, sdt: gl.constexpr, sdh: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr
):
    dk, dv, lse, delta, scale, scale_log2, T = pack
    k_main, k_tail, v_main, v_tail, q_main, q_tail, g_main, g_tail, message = tiles
    e_smem, d_smem = statistics  # of this tile and of the next, two by two
    item_full, kv_full, kv_empty, full, empty = bars
    TAIL: gl.constexpr = K > 64
    DTYPE: gl.constexpr = dk.dtype.element_ty
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)
    count = 0
    turn = 0
    length = _next(message, item_full, turn)
    while length > 0:
        first, head, row = _item(message, turn)
        left = length - row
        lse_ptr = lse + (head.to(gl.int64) * T + first)
        delta_ptr = delta + (head.to(gl.int64) * T + first)
        e_smem.index(count % 2).store(_statistic(lse_ptr, 0, length, float("inf")))
        d_smem.index(count % 2).store(_statistic(delta_ptr, 0, length, 0.0))
        e1 = _statistic(lse_ptr, 64, length, float("inf"))
        d1 = _statistic(delta_ptr, 64, length, 0.0)
        mbarrier.wait(kv_full.index(0), turn & 1)
        k = _main(k_main, 0)
        v = _main(v_main, 0)
        kt = _tail(k_tail, 0, K)
        vt = _tail(v_tail, 0, K)
        dk_r = gl.zeros([64, 64], gl.float32, ACC)
        dv_r = gl.zeros([64, 64], gl.float32, ACC)
        dk_t = gl.zeros([64, 16], gl.float32, ACC_TAIL)
        dv_t = gl.zeros([64, 16], gl.float32, ACC_TAIL)
        stage = count % STAGES
        mbarrier.wait(full.index(stage), count // STAGES & 1)
        if length < 64:
            _zero_rows(_main(q_main, stage), length, ROWS)
            _zero_rows(_main(g_main, stage), length, ROWS)
            if TAIL:
                _zero_rows(_tail(q_tail, stage, K), length, ROWS_TAIL)
                _zero_rows(_tail(g_tail, stage, K), length, ROWS_TAIL)
            fence_async_shared()
            barrier()
        s = warpgroup_mma_wait(0, [_product(k, kt, q_main, q_tail, stage, K)])
        e = e_smem.index(count % 2).load(OF_COLUMN)
        p = gl.exp2(s * scale_log2 - e[None, :]).to(DTYPE)
        for query in range(64, length, 64):
            stage = count % STAGES
            ahead = (count + 1) % STAGES
            dp_a = _product(v, vt, g_main, g_tail, stage, K)
            mbarrier.wait(full.index(ahead), (count + 1) // STAGES & 1)
            s_a = _product(k, kt, q_main, q_tail, ahead, K)
            dv_a, dv_ta, p_m, p_t = _accumulate(p, g_main, g_tail, stage, dv_r, dv_t, K)
            d = d_smem.index(count % 2).load(OF_COLUMN)
            e_smem.index((count + 1) % 2).store(e1)
            d_smem.index((count + 1) % 2).store(d1)
            e1 = _statistic(lse_ptr, query + 64, length, float("inf"))
            d1 = _statistic(delta_ptr, query + 64, length, 0.0)
            dp = warpgroup_mma_wait(4 if TAIL else 2, [dp_a])
            ds = (p.to(gl.float32) * (dp - d[None, :])).to(DTYPE)
            dk_a, dk_ta, ds_m, ds_t = _accumulate(ds, q_main, q_tail, stage, dk_r, dk_t, K)
            e = e_smem.index((count + 1) % 2).load(OF_COLUMN)
            s = warpgroup_mma_wait(4 if TAIL else 2, [s_a])
            p = gl.exp2(s * scale_log2 - e[None, :]).to(DTYPE)
            if TAIL:
                dv_r, dv_t, dk_r, dk_t, p_m, p_t, ds_m, ds_t = warpgroup_mma_wait(
                    0, [dv_a, dv_ta, dk_a, dk_ta, p_m, p_t, ds_m, ds_t]
                )
            else:
                dv_r, dk_r, p_m, ds_m = warpgroup_mma_wait(0, [dv_a, dk_a, p_m, ds_m])
            mbarrier.arrive(empty.index(stage), count=1)
            count += 1
        stage = count % STAGES
        dp_a = _product(v, vt, g_main, g_tail, stage, K)
        dv_a, dv_ta, p_m, p_t = _accumulate(p, g_main, g_tail, stage, dv_r, dv_t, K)
        d = d_smem.index(count % 2).load(OF_COLUMN)
        dp = warpgroup_mma_wait(2 if TAIL else 1, [dp_a])
        ds = (p.to(gl.float32) * (dp - d[None, :])).to(DTYPE)
        dk_a, dk_ta, ds_m, ds_t = _accumulate(ds, q_main, q_tail, stage, dk_r, dk_t, K)
        if TAIL:
            dv_r, dv_t, dk_r, dk_t, p_m, p_t, ds_m, ds_t = warpgroup_mma_wait(
                0, [dv_a, dv_ta, dk_a, dk_ta, p_m, p_t, ds_m, ds_t]
            )
        else:
            dv_r, dk_r, p_m, ds_m = warpgroup_mma_wait(0, [dv_a, dk_a, p_m, ds_m])
        mbarrier.arrive(empty.index(stage), count=1)
        count += 1
        lane, lane_tail = cut(head, K)
        place = head.to(gl.int64) * sdh + (first + row).to(gl.int64) * sdt
        _save(dk_r * scale, dk_t * scale, k, kt, dk + place, sdt, lane, lane_tail, left, K)
        _save(dv_r, dv_t, v, vt, dv + place, sdt, lane, lane_tail, left, K)
        fence_async_shared()
        mbarrier.arrive(kv_empty.index(0), count=1)
        turn += 1
        length = _next(message, item_full, turn)


@gluon.jit(do_not_specialize=["T", "S", "H", "blocks", "slot"], do_not_specialize_on_alignment=["lse", "cu_seqlens"])
def backward_kv(
    q, q_t, k, k_t, v, v_t, grad, grad_t, dk, dv, lse, delta, cu_seqlens, counters, scale, scale_log2,
    T, S, H, blocks, slot,
    sdt: gl.constexpr, sdh: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv, of strides (sdt, sdh, 1), from the delta that backward_q has left. The rest is as there."""
    DTYPE: gl.constexpr = dk.dtype.element_ty
    k_main = gl.allocate_shared_memory(DTYPE, [1, 64, 1, 64], TILE)
    v_main = gl.allocate_shared_memory(DTYPE, [1, 64, 1, 64], TILE)
    q_main = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 1, 64], TILE)
    g_main = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 1, 64], TILE)
    k_tail = k_main
    v_tail = v_main
    q_tail = q_main
    g_tail = g_main
    if K > 64:
        k_tail = gl.allocate_shared_memory(DTYPE, [1, 64, 1, 16], TILE_TAIL)
        v_tail = gl.allocate_shared_memory(DTYPE, [1, 64, 1, 16], TILE_TAIL)
        q_tail = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 1, 16], TILE_TAIL)
        g_tail = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 1, 16], TILE_TAIL)
    e_smem = gl.allocate_shared_memory(gl.float32, [2, 64], STATISTICS)
    d_smem = gl.allocate_shared_memory(gl.float32, [2, 64], STATISTICS)
    message = gl.allocate_shared_memory(gl.int32, [8, 1], STATISTICS)
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(item_full.index(i), count=1)
    mbarrier.init(kv_full.index(0), count=1)
    mbarrier.init(kv_empty.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    tiles = (k_main, k_tail, v_main, v_tail, q_main, q_tail, g_main, g_tail, message)
    statistics = (e_smem, d_smem)
    bars = (item_full, kv_full, kv_empty, full, empty)
    pack = (dk, dv, lse, delta, scale, scale_log2, T)
    source = (q, q_t, k, k_t, v, v_t, grad, grad_t)
    work = (cu_seqlens, counters + slot, S, H, blocks)
    gl.warp_specialize(
        [
            (_kv_consumer, (pack, tiles, statistics, bars, sdt, sdh, K, STAGES)),
            (_kv_producer, (source, tiles, bars, work, dk, dv, T, sdt, K, STAGES)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


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
    (slots, registers, of_launch), (stages, of_launch_kv, resident) = RESOURCES_Q[WGS], RESOURCES_KV
    common = lse, delta, cu_seqlens, counters, scale, scale * LOG2_E, T, S
    strides = dq.stride()[:2]
    more = K == 64
    # the second kernel begins after the first's end, so they share a work counter
    numbers_q = ceil_div(max_seqlen, 64 * WGS), slot, *strides, H, K, WGS, slots + 4 * more, registers, shift
    numbers_kv = H, ceil_div(max_seqlen, 64), slot, *strides, K, stages + more
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
