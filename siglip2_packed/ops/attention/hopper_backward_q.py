"""dQ and delta of the attention's backward on Hopper: see `hopper_backward`.

Shapes: T rows, S segments, H heads, K head_dim.

A work item is a block of WGS * 64 queries of one head of one segment; each of WGS consumers has a tile of them. delta
begins as sum(out * dO), which is sum(P * dP) but for roundings: of `out`, whose low-order part the forward kept
(`low_order`), and of P before it was multiplied with V. What it lacks is r = sum(dS): that is added to the delta that
backward_kv reads, and taken from dS evenly over the last tile's keys, so that dQ does not get r times all that keys
have in common.
"""

# mypy: disable-error-code="assignment"
# (a tuple grows where Triton unrolls the loop)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from siglip2_packed.ops.attention.hopper_items import (
    announce,
    announce_end,
    announced,
    barriers,
    consumer_release,
    consumer_wait,
    messages,
    next_length,
    pipeline,
    producer_acquire,
    schedule,
)
from siglip2_packed.ops.attention.hopper_tiles import (
    ACC,
    LANES,
    ROWS,
    accumulate,
    allocate,
    finished,
    first_lanes,
    load,
    part,
    parts,
    product,
    restored,
    scaled,
    store,
    tile_pair,
    within,
    zero_rows,
    zero_rows_beyond,
    zeros,
)
from siglip2_packed.ops.runtime.hopper import barrier

PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def _load_item(
    source, tiles, pipelines, first, length, head, row, segment, turn, count,
    K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings Q and dO of an item, tiles for each warpgroup, then through one ring `out`, and K and V in turn."""
    q, k, v, out, grad = source
    q_tiles, grad_tiles, ring, message = tiles
    item_full, q_pipeline, ring_pipeline = pipelines
    q_full, q_empty = q_pipeline
    lanes = first_lanes(head, K)
    q_stage = turn % 2
    for w in gl.static_range(WGS):
        mbarrier.wait(q_empty.index(q_stage + w * 2), (turn // 2 & 1) ^ 1)
    announce(message, turn, first, length, head, row)
    mbarrier.arrive(item_full.index(q_stage), count=1)
    for w in gl.static_range(WGS):
        bar = q_full.index(q_stage + w * 2)
        active = row + 64 * w < length
        load((q, grad), first + row + 64 * w, head, lanes, bar, (q_tiles, grad_tiles), q_stage + w * 2, K, active)
        mbarrier.arrive(bar, count=1, pred=row + 64 * w >= length)
    for r in range(row, gl.minimum(length, row + 64 * WGS), 64):
        bar = producer_acquire(ring_pipeline, count, STAGES)
        load((out,), first + r, head, lanes, bar, (ring,), count % STAGES, K)
        count += 1
    for start in range(0, length, 64):
        at = first + within(start, length)
        for x in gl.static_range(2):
            bar = producer_acquire(ring_pipeline, count, STAGES)
            load(((k, v)[x],), at, head, lanes, bar, (ring,), count % STAGES, K)
            count += 1
    return count


@gluon.jit
def _producer(
    source, tiles, pipelines, work, dq, T, row_stride: gl.constexpr,
    K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    cu_seqlens, counter, S, H, blocks = work
    item_full, q_pipeline, _ = pipelines
    _, q_empty = q_pipeline
    turn = schedule(_load_item, source, tiles, pipelines, cu_seqlens, counter, S, H, blocks, K, WGS, STAGES)
    for w in gl.static_range(WGS):
        mbarrier.wait(q_empty.index(turn % 2 + w * 2), (turn // 2 & 1) ^ 1)
    announce_end(tiles[-1], turn)
    mbarrier.arrive(item_full.index(turn % 2), count=1)
    zero_rows_beyond(dq, row_stride, H * K, gl.load(cu_seqlens + S), T)


@gluon.jit
def _load_low(low, row, head, left, H: gl.constexpr, K: gl.constexpr):
    """The output's low part, int8: [64, 64] and [64, 16], zeros in rows >= left and in lanes of other heads."""
    tile_begin = low + (row.to(gl.int64) * H + head) * K
    lanes = first_lanes(head, K)
    found = ()
    for i in gl.static_range(2 if K > 64 else 1):
        begin = tile_begin + lanes[i]
        rows = gl.arange(0, 64, gl.SliceLayout(1, ROWS[i]))
        here = gl.arange(0, LANES[i], gl.SliceLayout(0, ROWS[i]))
        real = (rows < left)[:, None]
        if i > 0:
            real = real & ((here >= -lanes[i]) & (here < K - lanes[i]))[None, :]
        places = begin + rows[:, None] * (H * K) + here[None, :]
        found += (gl.load(places, mask=real, other=0),)
    return found


@gluon.jit
def _row_sums(ring, stage, low, grad, LOW: gl.constexpr):
    """sum(out * dO) of each row: [64]."""
    total = 0.0
    for i in gl.static_range(len(grad)):
        x = restored(part(ring, stage, i).load(ROWS[i]), low[i] if LOW > 0 else 0, LOW)
        sums = gl.sum(x * grad[i].load(ROWS[i]).to(gl.float32), 1)
        sums = gl.convert_layout(sums, gl.SliceLayout(1, ACC[0]))
        total = sums if i == 0 else total + sums
    return total


@gluon.jit
def _mainloop(
    q, grad, ring, ring_pipeline, count, length, lse, delta, scale_log2,
    DTYPE: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ / scale of 64 queries over all keys of the segment; sums of the rows of dS; the tiles' count."""
    full, empty = ring_pipeline
    TAIL: gl.constexpr = K > 64
    tiles = (length + 63) // 64
    dq = zeros(K)  # [64, 64] and [64, 16]
    r = gl.zeros([64], gl.float32, gl.SliceLayout(1, ACC[0]))
    s = warpgroup_mma_wait(0, [product(q, ring, count % STAGES)])  # [64 queries, 64 keys]
    p = gl.exp2(s * scale_log2 - lse[:, None])
    for _ in range(1, tiles):
        k_stage = count % STAGES
        v_stage = (count + 1) % STAGES
        next_stage = (count + 2) % STAGES
        consumer_wait(full, count + 1, STAGES)
        dp_issued = product(grad, ring, v_stage)
        consumer_wait(full, count + 2, STAGES)
        s_issued = product(q, ring, next_stage)
        dp = warpgroup_mma_wait(2 if TAIL else 1, [dp_issued])
        ds = p * (dp - delta[:, None])
        r += gl.sum(ds, 1)
        dq_issued, operands = accumulate(ds.to(DTYPE), ring, k_stage, dq)
        s = warpgroup_mma_wait(2 if TAIL else 1, [s_issued])
        consumer_release(empty, count + 1, STAGES)
        p = gl.exp2(s * scale_log2 - lse[:, None])
        dq = finished(dq_issued, operands)
        consumer_release(empty, count, STAGES)
        count += 2
    k_stage = count % STAGES
    v_stage = (count + 1) % STAGES
    consumer_wait(full, count + 1, STAGES)
    dp = warpgroup_mma_wait(0, [product(grad, ring, v_stage)])
    consumer_release(empty, count + 1, STAGES)
    ds = p * (dp - delta[:, None])
    if tiles * 64 > length:  # keys of the tile before (in front) or another segment (behind)
        start = tiles * 64 - 64
        keys = within(start, length) + gl.arange(0, 64, gl.SliceLayout(0, ACC[0]))
        ds = gl.where(((keys >= start) & (keys < length))[None, :], ds, 0.0)
    r += gl.sum(ds, 1)
    ds = (ds - (r / gl.minimum(length, 64))[:, None]).to(DTYPE)
    dq_issued, operands = accumulate(ds, ring, k_stage, dq)
    dq = finished(dq_issued, operands)
    consumer_release(empty, count, STAGES)
    return dq, r, count + 2


@gluon.jit
def _consumer(
    W: gl.constexpr, pack, tiles, pipelines, row_stride: gl.constexpr, head_stride: gl.constexpr,
    H: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr, LOW: gl.constexpr,
):  # fmt: skip
    """Rows 64 W to 64 W + 63 of every item."""
    low, dq, lse, delta, scale, scale_log2, T = pack
    q_tiles, grad_tiles, ring, message = tiles
    item_full, q_pipeline, ring_pipeline = pipelines
    q_full, q_empty = q_pipeline
    full, empty = ring_pipeline
    DTYPE: gl.constexpr = dq.dtype.element_ty
    rows_layout: gl.constexpr = gl.SliceLayout(1, ACC[0])
    count = 0
    turn = 0
    length = next_length(message, item_full, turn)
    while length > 0:
        first, head, row = announced(message, turn)
        left = length - row - 64 * W
        tiles_of_keys = (length + 63) // 64
        q_stage = turn % 2 + W * 2
        if left > 0:
            rows = gl.arange(0, 64, rows_layout)
            place = head.to(gl.int64) * T + first + row + 64 * W
            e = gl.load(lse + place + rows, mask=rows < left, other=0.0)  # [64]
            low_tile = ()
            if LOW > 0:
                low_tile = _load_low(low, first + row + 64 * W, head, left, H, K)
            mbarrier.wait(q_full.index(q_stage), turn // 2 & 1)
            q, grad = tile_pair(q_tiles, grad_tiles, q_stage)  # each [64, 64] and [64, 16]
            for w in gl.static_range(WGS):
                if w != W:  # noqa: SIM102 (the outer is decided at compile time)
                    if row + 64 * w < length:  # a tile of `out` that is another warpgroup's
                        consumer_wait(full, count + w, STAGES)
                        consumer_release(empty, count + w, STAGES)
            consumer_wait(full, count + W, STAGES)
            d = _row_sums(ring, (count + W) % STAGES, low_tile, grad, LOW)
            fence_async_shared()  # reads by load, unlike those of products, may still be under way at the barrier
            consumer_release(empty, count + W, STAGES)
            count += gl.minimum((length - row + 63) // 64, WGS)
            consumer_wait(full, count, STAGES)
            if length < 64:
                zero_rows((ring,), count % STAGES, length)
                fence_async_shared()
                barrier()
            acc, r, count = _mainloop(q, grad, ring, ring_pipeline, count, length, e, d, scale_log2, DTYPE, K, STAGES)
            first, head, row = announced(message, turn)  # again: the mainloop has no registers for them
            left = length - row - 64 * W
            rows = gl.arange(0, 64, rows_layout)
            gl.store(delta + head.to(gl.int64) * T + first + row + 64 * W + rows, d + r, mask=rows < left)
            lanes = first_lanes(head, K)
            ptr = dq + head.to(gl.int64) * head_stride + (first + row + 64 * W).to(gl.int64) * row_stride
            store(scaled(acc, scale), q, ptr, row_stride, lanes, left, K)
            fence_async_shared()
            mbarrier.arrive(q_empty.index(q_stage), count=1)
        else:  # the item ends before
            mbarrier.wait(q_full.index(q_stage), turn // 2 & 1)
            for _ in range(0, 2 * tiles_of_keys + (length - row + 63) // 64):
                consumer_wait(full, count, STAGES)
                consumer_release(empty, count, STAGES)
                count += 1
            mbarrier.arrive(q_empty.index(q_stage), count=1)
        turn += 1
        length = next_length(message, item_full, turn)


@gluon.jit(do_not_specialize=["T", "S", "blocks", "slot"], do_not_specialize_on_alignment=["lse", "cu_seqlens"])
def backward_q(
    q, q_t, k, k_t, v, v_t, out, out_t, grad, grad_t, low, dq, lse, delta, cu_seqlens, counters, scale,
    scale_log2, T, S, blocks, slot,
    sdt: gl.constexpr, sdh: gl.constexpr, H: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, LOW: gl.constexpr,
):  # fmt: skip
    """dq, of strides (sdt, sdh, 1), and delta `[H, T]` of all rows within segments, which backward_kv reads.

    q, k, v, out, grad are descriptors of [T, H, K] with boxes [64, 1, 64], their tails with [64, 1, 16], or None at
    K = 64. low: contiguous, or None where LOW, the shift of `low_order`, is 0. blocks: those of max_seqlen rows. The
    work counter `counters[slot]` is zero before and after.
    """
    DTYPE: gl.constexpr = dq.dtype.element_ty
    q_tiles = allocate(DTYPE, 2 * WGS, K)  # [2 * WGS, 64, 1, 64] and [2 * WGS, 64, 1, 16]
    grad_tiles = allocate(DTYPE, 2 * WGS, K)  # the same
    ring = allocate(DTYPE, STAGES, K)  # [STAGES, 64, 1, 64] and [STAGES, 64, 1, 16]
    tiles = (q_tiles, grad_tiles, ring, messages())
    pipelines = (barriers(2), pipeline(2 * WGS, 1, 1), pipeline(STAGES, 1, WGS))
    fence_async_shared()
    pack = (low, dq, lse, delta, scale, scale_log2, T)
    source = (parts(q, q_t, K), parts(k, k_t, K), parts(v, v_t, K), parts(out, out_t, K), parts(grad, grad_t, K))
    work = (cu_seqlens, counters + slot, S, H, blocks)
    if WGS == 2:
        gl.warp_specialize(
            [
                (_consumer, (0, pack, tiles, pipelines, sdt, sdh, H, K, WGS, STAGES, LOW)),
                (_consumer, (1, pack, tiles, pipelines, sdt, sdh, H, K, WGS, STAGES, LOW)),
                (_producer, (source, tiles, pipelines, work, dq, T, sdt, K, WGS, STAGES)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (0, pack, tiles, pipelines, sdt, sdh, H, K, WGS, STAGES, LOW)),
                (_consumer, (1, pack, tiles, pipelines, sdt, sdh, H, K, WGS, STAGES, LOW)),
                (_consumer, (2, pack, tiles, pipelines, sdt, sdh, H, K, WGS, STAGES, LOW)),
                (_producer, (source, tiles, pipelines, work, dq, T, sdt, K, WGS, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )
