"""dK and dV of the attention's backward on Hopper: see `hopper_backward`.

Shapes: T rows, S segments, H heads, K head_dim.

A work item is a tile of 64 keys of one head of one segment, of one consumer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from siglip2_packed.ops.attention.hopper_items import (
    VECTOR,
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
    accumulate,
    allocate,
    finished_both,
    first_lanes,
    load,
    parts,
    product,
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

FLAT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _load_item(
    source, tiles, pipelines, first, length, head, row, segment, turn, count,
    K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings K and V of an item, then pairs of Q and dO."""
    q, k, v, grad = source
    k_tiles, v_tiles, q_tiles, grad_tiles, message = tiles
    item_full, kv_pipeline, pair_pipeline = pipelines
    lanes = first_lanes(head, K)
    # the message is free: K and V of its item, two turns ago, were released before those of the last one came
    announce(message, turn, first, length, head, row)
    mbarrier.arrive(item_full.index(turn % 2), count=1)
    at = first + row
    bar = producer_acquire(kv_pipeline, turn, 1)
    load((k, v), at, head, lanes, bar, (k_tiles, v_tiles), 0, K)
    for start in range(0, length, 64):
        at = first + within(start, length)
        bar = producer_acquire(pair_pipeline, count, STAGES)
        load((q, grad), at, head, lanes, bar, (q_tiles, grad_tiles), count % STAGES, K)
        count += 1
    return count


@gluon.jit
def _producer(
    source, tiles, pipelines, work, dk, dv, T, row_stride: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr
):
    cu_seqlens, counter, S, H, blocks = work
    item_full, _, _ = pipelines
    turn = schedule(_load_item, source, tiles, pipelines, cu_seqlens, counter, S, H, blocks, K, 1, STAGES)
    announce_end(tiles[-1], turn)
    mbarrier.arrive(item_full.index(turn % 2), count=1)
    last = gl.load(cu_seqlens + S)
    zero_rows_beyond(dk, row_stride, H * K, last, T)
    zero_rows_beyond(dv, row_stride, H * K, last, T)


@gluon.jit
def _statistic(ptr, query, length, other):
    """lse or delta of the tile of queries that belongs to `query`: [64]; `other` for other tiles or segments."""
    rows = within(query, length) + gl.arange(0, 64, FLAT)
    return gl.load(ptr + rows, mask=(rows >= query) & (rows < length), other=other)


@gluon.jit
def _mainloop(
    k, v, q_tiles, grad_tiles, statistics, pair_pipeline, count, length, lse, delta,
    next_lse, next_delta, scale_log2, DTYPE: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK / scale and dV of 64 keys over all queries of the segment, and the tiles' count."""
    TAIL: gl.constexpr = K > 64
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, ACC[0])
    lse_stages, delta_stages = statistics
    full, empty = pair_pipeline
    dk = zeros(K)  # [64, 64] and [64, 16]
    dv = zeros(K)  # the same
    stage = count % STAGES
    consumer_wait(full, count, STAGES)
    if length < 64:
        zero_rows((q_tiles, grad_tiles), stage, length)
        fence_async_shared()
        barrier()
    s = warpgroup_mma_wait(0, [product(k, q_tiles, stage)])  # [64 keys, 64 queries]
    e = lse_stages.index(count % 2).load(OF_COLUMN)
    p = gl.exp2(s * scale_log2 - e[None, :]).to(DTYPE)
    for query in range(64, length, 64):
        stage = count % STAGES
        next_stage = (count + 1) % STAGES
        dp_issued = product(v, grad_tiles, stage)
        consumer_wait(full, count + 1, STAGES)
        s_issued = product(k, q_tiles, next_stage)
        dv_issued, p_operands = accumulate(p, grad_tiles, stage, dv)
        d = delta_stages.index(count % 2).load(OF_COLUMN)
        lse_stages.index((count + 1) % 2).store(next_lse)
        delta_stages.index((count + 1) % 2).store(next_delta)
        next_lse = _statistic(lse, query + 64, length, float("inf"))
        next_delta = _statistic(delta, query + 64, length, 0.0)
        dp = warpgroup_mma_wait(4 if TAIL else 2, [dp_issued])
        ds = (p.to(gl.float32) * (dp - d[None, :])).to(DTYPE)
        dk_issued, ds_operands = accumulate(ds, q_tiles, stage, dk)
        e = lse_stages.index((count + 1) % 2).load(OF_COLUMN)
        s = warpgroup_mma_wait(4 if TAIL else 2, [s_issued])
        p = gl.exp2(s * scale_log2 - e[None, :]).to(DTYPE)
        dv, dk = finished_both(dv_issued, dk_issued, p_operands + ds_operands)
        consumer_release(empty, count, STAGES)
        count += 1
    stage = count % STAGES
    dp_issued = product(v, grad_tiles, stage)
    dv_issued, p_operands = accumulate(p, grad_tiles, stage, dv)
    d = delta_stages.index(count % 2).load(OF_COLUMN)
    dp = warpgroup_mma_wait(2 if TAIL else 1, [dp_issued])
    ds = (p.to(gl.float32) * (dp - d[None, :])).to(DTYPE)
    dk_issued, ds_operands = accumulate(ds, q_tiles, stage, dk)
    dv, dk = finished_both(dv_issued, dk_issued, p_operands + ds_operands)
    consumer_release(empty, count, STAGES)
    return dk, dv, count + 1


@gluon.jit
def _consumer(
    pack, tiles, statistics, pipelines, row_stride: gl.constexpr, head_stride: gl.constexpr,
    K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dk, dv, lse, delta, scale, scale_log2, T = pack
    k_tiles, v_tiles, q_tiles, grad_tiles, message = tiles
    lse_stages, delta_stages = statistics
    item_full, kv_pipeline, pair_pipeline = pipelines
    kv_full, kv_empty = kv_pipeline
    DTYPE: gl.constexpr = dk.dtype.element_ty
    count = 0
    turn = 0
    length = next_length(message, item_full, turn)
    while length > 0:
        first, head, row = announced(message, turn)
        left = length - row
        lse_ptr = lse + (head.to(gl.int64) * T + first)
        delta_ptr = delta + (head.to(gl.int64) * T + first)
        lse_stages.index(count % 2).store(_statistic(lse_ptr, 0, length, float("inf")))
        delta_stages.index(count % 2).store(_statistic(delta_ptr, 0, length, 0.0))
        next_lse = _statistic(lse_ptr, 64, length, float("inf"))
        next_delta = _statistic(delta_ptr, 64, length, 0.0)
        consumer_wait(kv_full, turn, 1)
        k, v = tile_pair(k_tiles, v_tiles, 0)  # each [64, 64] and [64, 16]
        dk_acc, dv_acc, count = _mainloop(
            k, v, q_tiles, grad_tiles, statistics, pair_pipeline, count, length, lse_ptr, delta_ptr,
            next_lse, next_delta, scale_log2, DTYPE, K, STAGES,
        )  # fmt: skip
        lanes = first_lanes(head, K)
        at = head.to(gl.int64) * head_stride + (first + row).to(gl.int64) * row_stride
        store(scaled(dk_acc, scale), k, dk + at, row_stride, lanes, left, K)
        store(dv_acc, v, dv + at, row_stride, lanes, left, K)
        fence_async_shared()
        consumer_release(kv_empty, turn, 1)
        turn += 1
        length = next_length(message, item_full, turn)


@gluon.jit(do_not_specialize=["T", "S", "H", "blocks", "slot"], do_not_specialize_on_alignment=["lse", "cu_seqlens"])
def backward_kv(
    q, q_t, k, k_t, v, v_t, grad, grad_t, dk, dv, lse, delta, cu_seqlens, counters, scale, scale_log2,
    T, S, H, blocks, slot,
    sdt: gl.constexpr, sdh: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv, of strides (sdt, sdh, 1), from the delta that backward_q has left. The rest is as there."""
    DTYPE: gl.constexpr = dk.dtype.element_ty
    k_tiles = allocate(DTYPE, 1, K)  # [1, 64, 1, 64] and [1, 64, 1, 16]
    v_tiles = allocate(DTYPE, 1, K)  # the same
    q_tiles = allocate(DTYPE, STAGES, K)  # [STAGES, 64, 1, 64] and [STAGES, 64, 1, 16]
    grad_tiles = allocate(DTYPE, STAGES, K)  # the same
    lse_stages = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)  # of a tile of queries, and of the next
    delta_stages = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
    tiles = (k_tiles, v_tiles, q_tiles, grad_tiles, messages())
    statistics = (lse_stages, delta_stages)
    pipelines = (barriers(2), pipeline(1, 1, 1), pipeline(STAGES, 1, 1))
    fence_async_shared()
    pack = (dk, dv, lse, delta, scale, scale_log2, T)
    source = (parts(q, q_t, K), parts(k, k_t, K), parts(v, v_t, K), parts(grad, grad_t, K))
    work = (cu_seqlens, counters + slot, S, H, blocks)
    gl.warp_specialize(
        [
            (_consumer, (pack, tiles, statistics, pipelines, sdt, sdh, K, STAGES)),
            (_producer, (source, tiles, pipelines, work, dk, dv, T, sdt, K, STAGES)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )
