"""The attention's forward on Hopper (compute capability 9.0), in Gluon, for head_dim 64 and 72.

Shapes: T rows, S segments, H heads, K head_dim.

A work item is a block of WGS * 64 query rows of one head of one segment. Thread blocks stay resident and draw items
from an atomic counter, long segments first, so that lengths may be mixed. In each, one warp (the producer) brings tiles
of 64 rows through the copy engine (TMA), running ahead into the next item, and WGS warpgroups (the consumers) have 64
query rows each: S = Q kT, softmax, O += P V, one key tile after another. While one waits for its products, others
compute.

A segment's last key tile is moved back to end with the segment and its first rows masked: no row of another segment
enters a product. In segments shorter than a tile V's rows behind the end are zeroed, because 0 * NaN is NaN.

Results do not depend on the order of the items: they are deterministic.
"""

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
    low_part,
    read,
    tell,
    walk,
    with_tails,
    work_counter,
    write,
)
from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.runtime.hopper import Launcher, barrier, copy, in_reach
from siglip2_packed.ops.runtime.launch import ceil_div, multiprocessors

# WGS: key tiles in flight (K = 64: one more), registers of consumers and of the launch, thread blocks a multiprocessor
RESOURCES = {2: (3, 104, 80, 2), 3: (7, 160, 128, 1)}
PRODUCER_REGISTERS = gl.constexpr(32)

FLAT = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))


@gluon.jit
def _copy(rows, rows_tail, row, head, tile, tile_tail, bar, K: gl.constexpr, pred=True):
    """Brings 64 rows of a head into shared memory; `bar` completes when they are there."""
    lane, lane_tail = cut(head, K)
    mbarrier.expect(bar, 64 * 128 + (64 * 32 if K > 64 else 0), pred=pred)
    copy(rows, [row, head, lane], bar, tile, pred=pred)
    if K > 64:
        copy(rows_tail, [row, head, lane_tail], bar, tile_tail, pred=pred)


@gluon.jit
def _bring(
    source, tiles, bars, first, length, head, row, turn, count,
    K: gl.constexpr, WGS: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Brings Q of an item, then K and V tile by tile."""
    q, q_tail, k, k_tail, v, v_tail = source
    sq, sq_tail, sk, sk_tail, sv, sv_tail, message = tiles
    q_full, q_empty, full, empty = bars
    place = turn % 2
    mbarrier.wait(q_empty.index(place), turn // 2 % 2 ^ 1)
    tell(message, place, first, length, head, row)
    for w in gl.static_range(WGS):
        there = row + 64 * w < length
        _copy(q, q_tail, first + row + 64 * w, head, sq.index(WGS * place + w),
              sq_tail.index(WGS * place + w), q_full.index(place), K, there)  # fmt: skip
        mbarrier.arrive(q_full.index(place), count=1, pred=row + 64 * w >= length)
    for start in range(0, length, 64):
        at = first + gl.maximum(gl.minimum(start, length - 64), 0)
        slot = count % RING
        mbarrier.wait(empty.index(slot), count // RING % 2 ^ 1)
        _copy(k, k_tail, at, head, sk.index(slot), sk_tail.index(slot), full.index(slot), K)
        _copy(v, v_tail, at, head, sv.index(slot), sv_tail.index(slot), full.index(slot), K)
        count += 1
    return count


@gluon.jit
def _producer(source, tiles, bars, work, H: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr, RING: gl.constexpr):
    cu_seqlens, counter, S, blocks = work
    turn = walk(_bring, source, tiles, bars, cu_seqlens, counter, S, H, blocks, K, WGS, RING)
    message = tiles[-1]
    q_full, q_empty, _, _ = bars
    mbarrier.wait(q_empty.index(turn % 2), turn // 2 % 2 ^ 1)
    write(message, turn % 2 * 4 + 1, 0)
    barrier()
    mbarrier.arrive(q_full.index(turn % 2), count=WGS)


@gluon.jit
def _consumer(
    W: gl.constexpr, pack, tiles, bars, H: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr, RING: gl.constexpr,
    LOW: gl.constexpr,
):  # fmt: skip
    """Rows 64 W to 64 W + 63 of every item."""
    out, low, lse, cu_seqlens, scale_log2, T, S = pack
    DTYPE: gl.constexpr = out.dtype.element_ty
    OF_ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    OF_ROW_TAIL: gl.constexpr = gl.SliceLayout(1, ACC_TAIL)
    sq, sq_tail, sk, sk_tail, sv, sv_tail, message = tiles
    q_full, q_empty, full, empty = bars
    rows = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    rows_tail = gl.arange(0, 64, gl.SliceLayout(1, ROWS_TAIL))
    lanes = gl.arange(0, 64, gl.SliceLayout(0, ROWS))
    lanes_tail = gl.arange(0, 16, gl.SliceLayout(0, ROWS_TAIL))
    turn = 0
    count = 0
    mbarrier.wait(q_full.index(0), 0)
    length = read(message, 1)
    while length > 0:
        place = turn % 2
        first = read(message, 4 * place)
        head = read(message, 4 * place + 2)
        row = read(message, 4 * place + 3) + 64 * W
        if row < length:
            q = sq.index(WGS * place + W).reshape([64, 64])
            if K > 64:
                q_tail = sq_tail.index(WGS * place + W).reshape([64, 16])
            if length < 64:
                slot = count % RING
                mbarrier.wait(full.index(slot), count // RING % 2)
                v = sv.index(slot).reshape([64, 64])
                v.store(gl.where((rows < length)[:, None], v.load(ROWS), 0.0))
                if K > 64:
                    v_tail = sv_tail.index(slot).reshape([64, 16])
                    v_tail.store(gl.where((rows_tail < length)[:, None], v_tail.load(ROWS_TAIL), 0.0))
                fence_async_shared()
                barrier()

            acc = gl.zeros([64, 64], gl.float32, ACC)
            acc_tail = gl.zeros([64, 16], gl.float32, ACC_TAIL)
            m = gl.full([64], float("-inf"), gl.float32, OF_ROW)
            total = gl.zeros([64], gl.float32, OF_ROW)
            for start in range(0, length, 64):
                slot = count % RING
                k = sk.index(slot).reshape([64, 64])
                v = sv.index(slot).reshape([64, 64])
                mbarrier.wait(full.index(slot), count // RING % 2)
                zero = gl.zeros([64, 64], gl.float32, ACC)
                s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
                if K > 64:
                    k_tail = sk_tail.index(slot).reshape([64, 16])
                    s = warpgroup_mma(q_tail, k_tail.permute((1, 0)), s, is_async=True)
                s = warpgroup_mma_wait(0, [s])
                if start + 64 > length:  # keys of the tile before, or behind the segment
                    keys = gl.maximum(gl.minimum(start, length - 64), 0) + gl.arange(0, 64, gl.SliceLayout(0, ACC))
                    s = gl.where(((keys >= start) & (keys < length))[None, :], s, float("-inf"))

                m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
                p = gl.exp2(s * scale_log2 - m_new[:, None])
                alpha = gl.exp2(m - m_new)
                total = total * alpha + gl.sum(p, 1)
                m = m_new
                acc = acc * alpha[:, None]
                p = p.to(DTYPE)
                p_main = gl.convert_layout(p, gl.DotOperandLayout(0, ACC, 2))
                acc = warpgroup_mma(p_main, v, acc, is_async=True)
                if K > 64:
                    v_tail = sv_tail.index(slot).reshape([64, 16])
                    acc_tail = acc_tail * gl.convert_layout(alpha, OF_ROW_TAIL)[:, None]
                    p_tail = gl.convert_layout(p, gl.DotOperandLayout(0, ACC_TAIL, 2))
                    acc_tail = warpgroup_mma(p_tail, v_tail, acc_tail, is_async=True)
                    acc, acc_tail, p_main, p_tail = warpgroup_mma_wait(0, [acc, acc_tail, p_main, p_tail])
                else:
                    acc, p_main = warpgroup_mma_wait(0, [acc, p_main])
                mbarrier.arrive(empty.index(slot), count=1)
                count += 1

            row_first = (first + row).to(gl.int64)
            left = length - row
            rows_acc = gl.arange(0, 64, OF_ROW)
            gl.store(lse + head.to(gl.int64) * T + row_first + rows_acc, m + gl.log2(total), mask=rows_acc < left)
            inverse = 1.0 / total  # through Q's place in shared memory, to store 16-byte pieces
            x = acc * inverse[:, None]
            rounded = x.to(DTYPE)
            q.store(rounded)
            o = q.load(ROWS)
            o_low = o
            if LOW > 0:
                q.store(low_part(x, rounded, LOW).to(DTYPE, bitcast=True))
                o_low = q.load(ROWS)
            if K > 64:
                x_tail = acc_tail * gl.convert_layout(inverse, OF_ROW_TAIL)[:, None]
                rounded_tail = x_tail.to(DTYPE)
                q_tail.store(rounded_tail)
                o_tail = q_tail.load(ROWS_TAIL)
                o_low_tail = o_tail
                if LOW > 0:
                    q_tail.store(low_part(x_tail, rounded_tail, LOW).to(DTYPE, bitcast=True))
                    o_low_tail = q_tail.load(ROWS_TAIL)
            fence_async_shared()
            mbarrier.arrive(q_empty.index(place), count=1)
            lane, lane_tail = cut(head, K)
            at = (row_first * H + head) * K
            offsets = at + rows[:, None] * (H * K) + lane + lanes[None, :]
            gl.store(out + offsets, o, mask=(rows < left)[:, None])
            if LOW > 0:
                gl.store(low + offsets, o_low.to(gl.int16, bitcast=True).to(gl.int8), mask=(rows < left)[:, None])
            if K > 64:
                here = lane_tail + lanes_tail
                real = (rows_tail < left)[:, None] & ((here >= 0) & (here < K))[None, :]
                offsets = at + rows_tail[:, None] * (H * K) + here[None, :]
                gl.store(out + offsets, o_tail, mask=real)
                if LOW > 0:
                    gl.store(low + offsets, o_low_tail.to(gl.int16, bitcast=True).to(gl.int8), mask=real)
        else:
            for _ in range(0, length, 64):
                mbarrier.wait(full.index(count % RING), count // RING % 2)
                mbarrier.arrive(empty.index(count % RING), count=1)
                count += 1
            mbarrier.arrive(q_empty.index(place), count=1)
        turn += 1
        mbarrier.wait(q_full.index(turn % 2), turn // 2 % 2)
        length = read(message, turn % 2 * 4 + 1)

    # rows beyond the last segment, in pieces of 8 lanes
    begin = gl.load(cu_seqlens + S).to(gl.int64) * (H * K // 8)
    end = T.to(gl.int64) * (H * K // 8)
    step: gl.constexpr = 128
    for piece in range(begin + (gl.program_id(0) * WGS + W) * step, end, gl.num_programs(0) * WGS * step):
        at = piece * 8 + gl.arange(0, 8 * step, FLAT)
        gl.store(out + at, gl.zeros([8 * step], DTYPE, FLAT), mask=at < end * 8)


@gluon.jit(do_not_specialize=["T", "S", "blocks", "slot"], do_not_specialize_on_alignment=["cu_seqlens"])
def forward_kernel(
    q, q_tail, k, k_tail, v, v_tail, out, low, lse, cu_seqlens, counters, scale_log2, T, S, blocks, slot,
    H: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr, RING: gl.constexpr, REGISTERS: gl.constexpr,
    LOW: gl.constexpr,
):  # fmt: skip
    """out = softmax(q kT) v, contiguous, and lse; the work counter `counters[slot]` is zero before and after.

    q, k, v are descriptors of [T, H, K] with boxes [64, 1, 64], their tails with [64, 1, 16], or None at K = 64.
    LOW: the shift of `low_order`, whose bytes are kept in `low`, contiguous; or 0, and none are. blocks: those of
    max_seqlen rows.
    """
    DTYPE: gl.constexpr = out.dtype.element_ty
    sq = gl.allocate_shared_memory(DTYPE, [2 * WGS, 64, 1, 64], TILE)
    sk = gl.allocate_shared_memory(DTYPE, [RING, 64, 1, 64], TILE)
    sv = gl.allocate_shared_memory(DTYPE, [RING, 64, 1, 64], TILE)
    sq_tail = sq
    sk_tail = sk
    sv_tail = sv
    if K > 64:
        sq_tail = gl.allocate_shared_memory(DTYPE, [2 * WGS, 64, 1, 16], TILE_TAIL)
        sk_tail = gl.allocate_shared_memory(DTYPE, [RING, 64, 1, 16], TILE_TAIL)
        sv_tail = gl.allocate_shared_memory(DTYPE, [RING, 64, 1, 16], TILE_TAIL)
    message = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=WGS)
        mbarrier.init(q_empty.index(i), count=WGS)
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=WGS)
    fence_async_shared()
    tiles = (sq, sq_tail, sk, sk_tail, sv, sv_tail, message)
    bars = (q_full, q_empty, full, empty)
    pack = (out, low, lse, cu_seqlens, scale_log2, T, S)
    source = (q, q_tail, k, k_tail, v, v_tail)
    work = (cu_seqlens, counters + slot, S, blocks)
    if WGS == 2:
        gl.warp_specialize(
            [
                (_consumer, (0, pack, tiles, bars, H, K, WGS, RING, LOW)),
                (_consumer, (1, pack, tiles, bars, H, K, WGS, RING, LOW)),
                (_producer, (source, tiles, bars, work, H, K, WGS, RING)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (0, pack, tiles, bars, H, K, WGS, RING, LOW)),
                (_consumer, (1, pack, tiles, bars, H, K, WGS, RING, LOW)),
                (_consumer, (2, pack, tiles, bars, H, K, WGS, RING, LOW)),
                (_producer, (source, tiles, bars, work, H, K, WGS, RING)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )


def forward(
    WGS: int,
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
    """Fills out `[T, H, K]`, contiguous, and the base-2 log-sum-exp `[H, T]` in float32, WGS * 64 queries at a time.

    And `low`, if it is kept; see `low_order`.
    """
    q, k, v = in_reach(q, k, v)
    T, H, K = q.shape
    S, blocks, (counters, slot) = len(cu_seqlens) - 1, ceil_div(max_seqlen, 64 * WGS), work_counter(q.device)
    (ring, registers, of_launch, resident), shift = RESOURCES[WGS], low_order.shift(out, low)
    numbers = scale * LOG2_E, T, S, blocks, slot, H, K, WGS, ring + (K == 64), registers, shift
    arguments = *with_tails(q, k, v), out, low, lse, cu_seqlens, counters, *numbers
    key = q.device, q.dtype, H, K, WGS, shift
    launcher = _launchers.get(key)
    if launcher is None:
        launcher = Launcher(forward_kernel, arguments, TILES * 3, num_warps=4, maxnreg=of_launch)
        _launchers[key] = launcher
    items = H * (T // (64 * WGS) + S)  # at most
    launcher((max(1, min(items, resident * multiprocessors(q.device))), 1, 1), arguments)


_launchers: dict[tuple, Launcher] = {}
