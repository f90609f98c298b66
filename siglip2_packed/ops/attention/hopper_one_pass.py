"""dQ, dK and dV of the attention's backward in one pass, five products, on Hopper: see `hopper_backward`.

Shapes: T rows, S segments, H heads, K head_dim.

A work item is a block of 128 keys of one head of one segment; two warpgroups (`_keys`) have 64 of them each. They meet
one query tile after another, and leave dS in shared memory, from which a third (`_queries`) makes the block's part of
dQ. Two warps (`_adder`) have the copy engine add it to `sums` (`hopper_sums`), in float32, when the part of the block
before is there: sums do not depend on which block was faster. Blocks of a head are drawn in their order, so that none
waits for one that nobody has drawn.

In shared memory K has ones in lanes outside the head. They do not change S, for Q has zeros there; in dQ they leave the
sum of each row of dS, as it was multiplied with K.
"""

# mypy: disable-error-code="assignment"
# (a tuple grows where Triton unrolls the loop)

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from siglip2_packed.ops.attention import hopper_sums
from siglip2_packed.ops.attention.hopper_items import (
    announce,
    announce_end,
    announced,
    announced_tile,
    consumer_release,
    consumer_wait,
    messages,
    next_length,
    pipeline,
    producer_acquire,
    schedule,
    work_counter,
)
from siglip2_packed.ops.attention.hopper_tiles import (
    ACC,
    ROWS,
    TILES,
    accumulate,
    allocate,
    finished_both,
    first_lanes,
    load,
    part,
    parts,
    product,
    scaled,
    store,
    tile,
    with_tails,
    within,
    zero_rows,
    zero_rows_beyond,
    zeros,
)
from siglip2_packed.ops.runtime import hopper
from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.runtime.hopper import Launcher, Tiles, barrier, copy, in_reach
from siglip2_packed.ops.runtime.launch import ceil_div, multiprocessors

# stages of query tiles (K = 64: one more), registers of the second warpgroup of keys, of that of queries, of the launch
RESOURCES = 3, 208, 72, 128
WARP_REGISTERS = gl.constexpr(24)  # of the adders and of the producer
DS_STAGES = gl.constexpr(2)

DS = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # [64 keys, 64 queries]
SUMS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
STATISTICS = gl.constexpr(gl.NVMMASharedLayout(0, 32, 1))


@gluon.jit
def _load_item(
    source, tiles, pipelines, first, length, head, row, segment, turn, count,
    K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings K and V of an item, then query tiles: Q and dO, with their lse and delta."""
    q, k, v, grad, statistics, tiles_of_head = source
    k_tiles, v_tiles, q_tiles, grad_tiles, statistics_stages, message = tiles
    item_pipeline, kv_pipeline, q_pipeline = pipelines
    lanes = first_lanes(head, K)
    number = head * tiles_of_head + first // 64 + segment  # see hopper_sums
    bar = producer_acquire(item_pipeline, turn, 2)
    announce(message, turn, first, length, head, row, number)
    mbarrier.arrive(bar, count=1)
    bar = producer_acquire(kv_pipeline, turn, 1)
    for w in gl.static_range(WGS):
        load((k, v), first + row + 64 * w, head, lanes, bar, (k_tiles, v_tiles), w, K)
    for start in range(0, length, 64):
        at = first + within(start, length)
        bar = producer_acquire(q_pipeline, count, STAGES)
        load((q, grad), at, head, lanes, bar, (q_tiles, grad_tiles), count % STAGES, K)
        mbarrier.expect(bar, 2 * 64 * 4)
        copy(statistics, [(number + start // 64) * 128], bar, statistics_stages.index(count % STAGES))
        count += 1
    return count


@gluon.jit
def _producer(
    source, tiles, pipelines, work, dk, dv, T, row_stride: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr
):
    cu_seqlens, counter, S, H, blocks = work
    turn = schedule(_load_item, source, tiles, pipelines, cu_seqlens, counter, S, H, blocks, K, 2, STAGES, True)
    bar = producer_acquire(pipelines[0], turn, 2)
    announce_end(tiles[-1], turn)
    mbarrier.arrive(bar, count=1)
    last = gl.load(cu_seqlens + S)
    zero_rows_beyond(dk, row_stride, H * K, last, T)
    zero_rows_beyond(dv, row_stride, H * K, last, T)


@gluon.jit
def _put_ones(k_tiles, w: gl.constexpr, first_lane, left, K: gl.constexpr):
    """In K's lanes outside the head; and zeros in its rows behind the segment."""
    tail = part(k_tiles, w, 1)
    here = gl.arange(0, 16, gl.SliceLayout(0, ROWS[1])) + first_lane
    tail.store(gl.where(((here < 0) | (here >= K))[None, :], 1.0, tail.load(ROWS[1])).to(tail.dtype))
    if left < 64:
        zero_rows((k_tiles,), w, left)
    fence_async_shared()
    barrier()


@gluon.jit
def _leave(ds, ds_stages, ds_pipeline, count, W: gl.constexpr):
    """dS of 64 keys for the warpgroup that makes dQ."""
    full, empty = ds_pipeline
    stage = count % DS_STAGES
    mbarrier.wait(empty.index(stage), (count // DS_STAGES & 1) ^ 1)
    ds_stages.index(stage * 2 + W).store(ds)
    fence_async_shared()
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _mainloop(
    k, v, tiles, q_pipeline, ds_stages, ds_pipeline, count, length, scale_log2,
    W: gl.constexpr, DTYPE: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK / scale and dV of 64 keys over all queries of the segment, and the tiles' count."""
    TAIL: gl.constexpr = K > 64
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, ACC[0])
    q_tiles, grad_tiles, statistics = tiles  # of these, lse and delta of 64 queries
    full, empty = q_pipeline
    dk = zeros(K)  # [64, 64] and [64, 16]
    dv = zeros(K)  # the same
    stage = count % STAGES
    consumer_wait(full, count, STAGES)
    if length < 64:  # by both warpgroups, who write the same
        zero_rows((q_tiles, grad_tiles), stage, length)
        fence_async_shared()
        barrier()
    s = warpgroup_mma_wait(0, [product(k, q_tiles, stage)])  # [64 keys, 64 queries]
    e = statistics.index(stage).slice(0, 64).load(OF_COLUMN)
    p = gl.exp2(s * scale_log2 - e[None, :]).to(DTYPE)
    for _ in range(64, length, 64):
        stage = count % STAGES
        next_stage = (count + 1) % STAGES
        dp_issued = product(v, grad_tiles, stage)
        consumer_wait(full, count + 1, STAGES)
        s_issued = product(k, q_tiles, next_stage)
        dv_issued, p_operands = accumulate(p, grad_tiles, stage, dv)
        dp = warpgroup_mma_wait(4 if TAIL else 2, [dp_issued])
        d = statistics.index(stage).slice(64, 64).load(OF_COLUMN)
        ds = (p.to(gl.float32) * (dp - d[None, :])).to(DTYPE)
        dk_issued, ds_operands = accumulate(ds, q_tiles, stage, dk)
        _leave(ds, ds_stages, ds_pipeline, count, W)
        s = warpgroup_mma_wait(4 if TAIL else 2, [s_issued])
        e = statistics.index(next_stage).slice(0, 64).load(OF_COLUMN)
        p = gl.exp2(s * scale_log2 - e[None, :]).to(DTYPE)
        dv, dk = finished_both(dv_issued, dk_issued, p_operands + ds_operands)
        consumer_release(empty, count, STAGES)
        count += 1
    stage = count % STAGES
    dp_issued = product(v, grad_tiles, stage)
    dv_issued, p_operands = accumulate(p, grad_tiles, stage, dv)
    d = statistics.index(stage).slice(64, 64).load(OF_COLUMN)
    dp = warpgroup_mma_wait(2 if TAIL else 1, [dp_issued])
    ds = (p.to(gl.float32) * (dp - d[None, :])).to(DTYPE)
    dk_issued, ds_operands = accumulate(ds, q_tiles, stage, dk)
    _leave(ds, ds_stages, ds_pipeline, count, W)
    dv, dk = finished_both(dv_issued, dk_issued, p_operands + ds_operands)
    consumer_release(empty, count, STAGES)
    return dk, dv, count + 1


@gluon.jit
def _keys(
    W: gl.constexpr, pack, tiles, ds_stages, pipelines, row_stride: gl.constexpr, head_stride: gl.constexpr,
    K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of keys 64 W to 64 W + 63 of every item."""
    dk, dv, scale, scale_log2 = pack
    k_tiles, v_tiles, q_tiles, grad_tiles, statistics, message = tiles
    item_pipeline, kv_pipeline, q_pipeline, ds_pipeline = pipelines
    item_full, item_empty = item_pipeline
    kv_full, kv_empty = kv_pipeline
    DTYPE: gl.constexpr = dk.dtype.element_ty
    count = 0
    turn = 0
    length = next_length(message, item_full, turn)
    while length > 0:
        first, head, row = announced(message, turn)
        consumer_wait(kv_full, turn, 1)
        _put_ones(k_tiles, W, first_lanes(head, K)[1], length - row - 64 * W, K)
        k = tile(k_tiles if K > 64 else k_tiles[:1], W)  # [64, 64] and [64, 16]
        v = tile(v_tiles, W)  # the same
        dk_acc, dv_acc, count = _mainloop(
            k, v, (q_tiles, grad_tiles, statistics), q_pipeline, ds_stages, ds_pipeline, count, length, scale_log2,
            W, DTYPE, K, STAGES,
        )  # fmt: skip
        first, head, row = announced(message, turn)  # again: the mainloop has no registers for them
        consumer_release(item_empty, turn, 2)
        lanes = first_lanes(head, K)
        row += 64 * W
        at = head.to(gl.int64) * head_stride + (first + row).to(gl.int64) * row_stride
        store(dv_acc, v, dv + at, row_stride, lanes, length - row, K)
        store(scaled(dk_acc, scale), v, dk + at, row_stride, lanes, length - row, K)
        fence_async_shared()
        consumer_release(kv_empty, turn, 1)
        turn += 1
        length = next_length(message, item_full, turn)


@gluon.jit
def _by_threads(x):
    """An accumulator with 4 adjacent values of a thread side by side: [64, 64] -> [128, 32], [64, 16] -> [32, 32]."""
    PIECES: gl.constexpr = x.shape[1] // 8
    x = gl.permute(gl.reshape(x, [4, 2, 4, 2, PIECES, 4, 2]), [4, 0, 2, 3, 5, 1, 6])
    return gl.reshape(x, [16 * PIECES, 32])


@gluon.jit
def _queries(tiles, ds_stages, sums_stages, pipelines):
    """What a block of keys adds to dQ / scale, for one query tile after another."""
    k_tiles, message = tiles
    item_pipeline, kv_pipeline, ds_pipeline, sums_pipeline = pipelines
    item_full, item_empty = item_pipeline
    ds_full, ds_empty = ds_pipeline
    sums_full, sums_empty = sums_pipeline
    main, tail = sums_stages
    count = 0
    turn = 0
    length = next_length(message, item_full, turn)
    while length > 0:
        left = length - announced(message, turn)[2]
        consumer_release(item_empty, turn, 2)
        for _ in range(0, length, 64):
            stage = count % DS_STAGES
            consumer_wait(ds_full, count, DS_STAGES)
            if left < 128:  # what keys behind the segment have left is anything
                rows = gl.arange(0, 64, gl.SliceLayout(1, ROWS[0]))
                for w in gl.static_range(2):
                    ds = ds_stages.index(stage * 2 + w)
                    ds.store(gl.where((rows < left - 64 * w)[:, None], ds.load(ROWS[0]), 0.0).to(ds.dtype))
                fence_async_shared()
                barrier()
            dq = zeros(72)  # [64, 64] and [64, 16]
            for w in gl.static_range(2):
                ds = ds_stages.index(stage * 2 + w).permute((1, 0))  # [64 queries, 64 keys]
                issued = ()
                for i in gl.static_range(2):
                    issued += (warpgroup_mma(ds, part(k_tiles, w, i), dq[i], use_acc=w > 0, is_async=True),)
                dq = issued
            dq = warpgroup_mma_wait(0, dq)
            consumer_release(ds_empty, count, DS_STAGES)
            stage = count % 2
            mbarrier.wait(sums_empty.index(stage), (count // 2 & 1) ^ 1)
            main.index(stage).store(_by_threads(dq[0]))
            tail.index(stage).store(_by_threads(dq[1]))
            fence_async_shared()
            mbarrier.arrive(sums_full.index(stage), count=1)
            count += 1
        consumer_release(kv_pipeline[1], turn, 1)
        turn += 1
        length = next_length(message, item_full, turn)


@gluon.jit
def _each_lane(CODE: gl.constexpr):
    x = gl.full([32], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(CODE, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _adder(W: gl.constexpr, sums, sums_stages, added, message, pipelines):
    """Adds those of `_queries` that are in stage W to `sums`, behind those of the block before."""
    main, tail = sums
    item_pipeline, sums_pipeline = pipelines
    item_full, item_empty = item_pipeline
    sums_full, sums_empty = sums_pipeline
    of_main, of_tail = sums_stages[0].index(W), sums_stages[1].index(W)
    begin = W  # the item's first tile that goes through this stage
    count = 0
    turn = 0
    length = next_length(message, item_full, turn, 1)
    while length > 0:
        row, number = announced_tile(message, turn, 1)
        consumer_release(item_empty, turn, 2)
        block = row // 128
        tiles = (length + 63) // 64
        for i in range(begin, tiles, 2):
            blocks = added + number + i
            at = (number + i) * 160
            if block > 0:
                there = gl.atomic_add(blocks, 0, sem="acquire")
                while there < block:
                    there = gl.atomic_add(blocks, 0, sem="acquire")
                _each_lane("fence.proxy.async; mov.b32 $0, $1;")
            mbarrier.wait(sums_full.index(W), count & 1)
            if block > 0:
                hopper.add(main, [at, 0], of_main)
                hopper.add(tail, [at + 128, 0], of_tail)
            else:
                hopper.store(main, [at, 0], of_main)
                hopper.store(tail, [at + 128, 0], of_tail)
            tma.store_wait(0)  # the stage has been read
            mbarrier.arrive(sums_empty.index(W), count=1)
            _each_lane("cp.async.bulk.wait_group 0; mov.b32 $0, $1;")  # the sums are there
            barrier()
            gl.atomic_xchg(blocks, block + 1, sem="release")
            count += 1
        begin = (begin + tiles) % 2
        turn += 1
        length = next_length(message, item_full, turn, 1)


@gluon.jit(
    do_not_specialize=["T", "S", "H", "blocks", "slot", "tiles_of_head"],
    do_not_specialize_on_alignment=["cu_seqlens", "added"],
)
def backward_kernel(
    q, q_t, k, k_t, v, v_t, grad, grad_t, sums, sums_t, statistics, dk, dv, added, cu_seqlens, counters,
    scale, scale_log2, T, S, H, blocks, slot, tiles_of_head,
    sdt: gl.constexpr, sdh: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, REGISTERS_Q: gl.constexpr,
):  # fmt: skip
    """dk and dv, of strides (sdt, sdh, 1), and the `sums` of dq.

    q, k, v, grad are descriptors of [T, H, K] with boxes [64, 1, 64], their tails with [64, 1, 16], or None at K = 64.
    sums, statistics, added: as `hopper_sums` has them. blocks: those of max_seqlen rows. The work counter
    `counters[slot]` is zero before and after.
    """
    DTYPE: gl.constexpr = dk.dtype.element_ty
    k_tiles = allocate(DTYPE, 2, 72)  # [2, 64, 1, 64] and [2, 64, 1, 16]
    v_tiles = allocate(DTYPE, 2, K)  # the same, without tails at K = 64
    q_tiles = allocate(DTYPE, STAGES, K)  # [STAGES, 64, 1, 64] and [STAGES, 64, 1, 16]
    grad_tiles = allocate(DTYPE, STAGES, K)  # the same
    statistics_stages = gl.allocate_shared_memory(gl.float32, [STAGES, 128], STATISTICS)
    ds_stages = gl.allocate_shared_memory(DTYPE, [2 * DS_STAGES, 64, 64], DS)
    main = gl.allocate_shared_memory(gl.float32, [2, 128, 32], SUMS)
    tail = gl.allocate_shared_memory(gl.float32, [2, 32, 32], SUMS)
    message = messages()
    item_pipeline, kv_pipeline, q_pipeline = pipeline(2, 1, 5), pipeline(1, 2, 3), pipeline(STAGES, 2, 2)
    ds_pipeline, sums_pipeline = pipeline(DS_STAGES, 2, 1), pipeline(2, 1, 1)
    fence_async_shared()
    stages = (k_tiles, v_tiles, q_tiles, grad_tiles, statistics_stages, message)
    source = (parts(q, q_t, K), parts(k, k_t, K), parts(v, v_t, K), parts(grad, grad_t, K), statistics, tiles_of_head)
    pack = (dk, dv, scale, scale_log2)
    work = (cu_seqlens, counters + slot, S, H, blocks)
    of_keys = (item_pipeline, kv_pipeline, q_pipeline, ds_pipeline)
    of_queries = (item_pipeline, kv_pipeline, ds_pipeline, sums_pipeline)
    of_adders = (item_pipeline, sums_pipeline)
    of_producer = (item_pipeline, kv_pipeline, q_pipeline)
    gl.warp_specialize(
        [
            (_keys, (0, pack, stages, ds_stages, of_keys, sdt, sdh, K, STAGES)),
            (_keys, (1, pack, stages, ds_stages, of_keys, sdt, sdh, K, STAGES)),
            (_queries, ((k_tiles, message), ds_stages, (main, tail), of_queries)),
            (_adder, (0, (sums, sums_t), (main, tail), added, message, of_adders)),
            (_adder, (1, (sums, sums_t), (main, tail), added, message, of_adders)),
            (_producer, (source, stages, of_producer, work, dk, dv, T, sdt, K, STAGES)),
        ],
        [4, 4, 1, 1, 1],
        [REGISTERS, REGISTERS_Q, WARP_REGISTERS, WARP_REGISTERS, WARP_REGISTERS],
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
    """Fills dq, dk and dv, WGS * 64 = 128 keys at a time. The three share strides; their heads lie side by side."""
    grad, q, k, v, out = in_reach(grad, q, k, v, out)
    T, H, K = q.shape
    S, (counters, slot) = len(cu_seqlens) - 1, work_counter(q.device)
    sums = hopper_sums.begin(grad, k, out, low, lse, cu_seqlens, max_seqlen)
    stages, registers, of_queries, of_launch = RESOURCES
    strides = dq.stride()[:2]
    more = K == 64
    arguments = (
        *with_tails(q, k, v, grad), sums.sums, sums.sums, sums.statistics, dk, dv, sums.added, cu_seqlens, counters,
        scale, scale * LOG2_E, T, S, H, ceil_div(max_seqlen, 64 * WGS), slot, sums.tiles_of_head,
        *strides, K, stages + more, registers, of_queries,
    )  # fmt: skip
    key = q.device, q.dtype, *strides, H, K
    launcher = _launchers.get(key)
    if launcher is None:
        of_sums = Tiles([128, 32], SUMS.value), Tiles([32, 32], SUMS.value)
        boxes = *TILES * 4, *of_sums, Tiles([128], STATISTICS.value)
        launcher = _launchers[key] = Launcher(backward_kernel, arguments, boxes, num_warps=4, maxnreg=of_launch)
    items = H * (T // (64 * WGS) + S)  # at most
    launcher((max(1, min(items, multiprocessors(q.device))), 1, 1), arguments)
    sums.store(dq, scale)


_launchers: dict[tuple, Launcher] = {}
