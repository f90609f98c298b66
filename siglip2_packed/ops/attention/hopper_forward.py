"""The attention's forward on Hopper (compute capability 9.0), in Gluon, for head_dim 64 and 72.

Shapes: T rows, S segments, H heads, K head_dim.

A work item is a block of WGS * 64 query rows of one head of one segment. Thread blocks stay resident and draw items
from the tile scheduler (`hopper_items`). In each, one warp (the producer) brings tiles of 64 rows (`hopper_tiles`),
running ahead into the next item, and WGS warpgroups (the consumers) have 64 query rows each: S = Q kT, softmax
(`hopper_softmax`), O += P V, one key tile after another. While one waits for its products, others compute. V has lanes
of ones, for which O has the row sums of P (`hopper_values`), of P as it is rounded: those of lse are the exact ones
where backward reads it with `low`, and these where nothing or whole rows of P are read.

A segment's last key tile comes first: it is moved back to end with the segment, and its rows of the tile before are
masked, ahead of the mainloop, which masks nothing. No row of another segment enters a product. In segments shorter than
a tile V's rows behind the end are zeroed, because 0 * NaN is NaN.

The epilogue puts 64 rows where Q was, and the copy engine takes them from there while the next item is computed. It
would take rows behind the segment, too: where there are fewer, and where `low` is kept, the threads store them.

A row's result depends on its segment alone, and not on the order of the items: results are deterministic.
"""

# mypy: disable-error-code="assignment"
# (a tuple grows where Triton unrolls the loop)

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from siglip2_packed.ops.attention import low_order
from siglip2_packed.ops.attention.hopper_items import (
    announce,
    announce_end,
    announced,
    consumer_release,
    consumer_wait,
    messages,
    next_length,
    pipeline,
    schedule,
    work_counter,
)
from siglip2_packed.ops.attention.hopper_softmax import rescaled, row_max, softmax
from siglip2_packed.ops.attention.hopper_tiles import (
    ACC,
    TILES,
    allocate,
    first_lanes,
    load,
    low_part,
    parts,
    product,
    tile,
    with_tails,
    within,
)
from siglip2_packed.ops.attention.hopper_values import (
    VALUES,
    add_values,
    allocate_values,
    load_values,
    no_values,
    own_parts,
    row_sums,
    store_rows,
    store_tile,
    zero_values,
)
from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.runtime.hopper import Launcher, in_reach
from siglip2_packed.ops.runtime.launch import ceil_div, multiprocessors

# WGS: stages of keys and values (K = 64: one more), registers of consumers and of the launch, thread blocks a
# multiprocessor
RESOURCES = {2: (3, 104, 80, 2), 3: (7, 160, 128, 1)}
PRODUCER_REGISTERS = gl.constexpr(32)

ZEROS = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))


@gluon.jit
def _load_item(
    source, tiles, pipelines, first, length, head, row, segment, turn, count,
    K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings Q of an item, a tile for each warpgroup, then K and V tile by tile, the last tile first."""
    q, k, v = source
    q_tiles, k_tiles, v_tiles, message = tiles
    q_pipeline, kv_pipeline = pipelines
    q_full, q_empty = q_pipeline
    kv_full, kv_empty = kv_pipeline
    lanes = first_lanes(head, K)
    stage, phase = turn % 2, turn // 2 % 2
    mbarrier.wait(q_empty.index(stage), phase ^ 1)
    announce(message, turn, first, length, head, row)
    for w in gl.static_range(WGS):
        bar = q_full.index(stage)
        active = row + 64 * w < length
        load((q,), first + row + 64 * w, head, lanes, bar, (q_tiles,), WGS * stage + w, K, active)
        mbarrier.arrive(bar, count=1, pred=row + 64 * w >= length)
    start = (length - 1) // 64 * 64  # of the last key tile
    for after in range(0, length, 64):
        at = first + within(start, length)
        stage, phase = count % STAGES, count // STAGES % 2
        bar = kv_full.index(stage)
        mbarrier.wait(kv_empty.index(stage), phase ^ 1)
        load((k,), at, head, lanes, bar, (k_tiles,), stage, K)
        load_values(v, at, head, bar, v_tiles, stage, K)
        start = after
        count += 1
    return count


@gluon.jit
def _producer(
    source, tiles, pipelines, work, H: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr
):
    cu_seqlens, counter, S, blocks = work
    turn = schedule(_load_item, source, tiles, pipelines, cu_seqlens, counter, S, H, blocks, K, WGS, STAGES)
    q_pipeline, _ = pipelines
    q_full, q_empty = q_pipeline
    mbarrier.wait(q_empty.index(turn % 2), turn // 2 % 2 ^ 1)
    announce_end(tiles[-1], turn)
    mbarrier.arrive(q_full.index(turn % 2), count=WGS)


@gluon.jit
def _scores(q, k_tiles, kv_full, count, STAGES: gl.constexpr):
    """[64 queries, 64 keys], of the key tile behind `count` others, once it is there."""
    consumer_wait(kv_full, count, STAGES)
    return warpgroup_mma_wait(0, [product(q, k_tiles, count % STAGES)])


@gluon.jit
def _mainloop(
    q, k_tiles, v_tiles, kv_pipeline, count, length, scale_log2,
    DTYPE: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """O, not yet divided, of 64 queries over all keys of the segment; m of `hopper_softmax`; the tiles' count.

    And the row sums of P before it is rounded, if EXACT.
    """
    kv_full, kv_empty = kv_pipeline
    s = _scores(q, k_tiles, kv_full, count, STAGES)
    if length % 64 != 0:  # keys of the tile before, or behind the segment
        start = length // 64 * 64
        keys = within(start, length) + gl.arange(0, 64, gl.SliceLayout(0, ACC[0]))
        s = gl.where(((keys >= start) & (keys < length))[None, :], s, float("-inf"))
    m = row_max(s) * scale_log2
    p = gl.exp2(s * scale_log2 - m[:, None])
    total = gl.sum(p, 1) if EXACT else m
    o = add_values(p.to(DTYPE), v_tiles, count % STAGES, no_values(K), K, FIRST=True)  # [64, 64] and its side
    consumer_release(kv_empty, count, STAGES)
    count += 1
    for _ in range(64, length, 64):
        s = _scores(q, k_tiles, kv_full, count, STAGES)
        p, m, alpha = softmax(s, m, scale_log2)
        if EXACT:
            total = total * alpha + gl.sum(p, 1)
        o = add_values(p.to(DTYPE), v_tiles, count % STAGES, rescaled(o, alpha), K, FIRST=False)
        consumer_release(kv_empty, count, STAGES)
        count += 1
    return o, m, total, count


@gluon.jit
def _epilogue(
    o, m, total, q_tiles, place, out_tiles, out, low, lse, T, row, head, left,
    H: gl.constexpr, K: gl.constexpr, LOW: gl.constexpr,
):  # fmt: skip
    """Stores `left` rows from `row` on, through Q's place in shared memory."""
    DTYPE: gl.constexpr = out.dtype.element_ty
    sums = row_sums(o, K)
    rows = gl.arange(0, 64, gl.SliceLayout(1, ACC[0]))
    exact = total if LOW > 0 else sums
    gl.store(lse + head.to(gl.int64) * T + row + rows, m + gl.log2(exact), mask=rows < left)
    inverse = 1.0 / sums
    at = row.to(gl.int64) * (H * K) + head * K
    through = own_parts(q_tiles, place, K)  # [64, 64] and [64, 16]
    x = ()
    for i in gl.static_range(len(through)):
        x += (o[i] * gl.convert_layout(inverse, gl.SliceLayout(1, o[i].type.layout))[:, None],)
        through[i].store(x[i].to(DTYPE))
    if LOW > 0:
        store_rows(q_tiles, place, out + at, H * K, head, left, K)
        for i in gl.static_range(len(through)):
            through[i].store(low_part(x[i], x[i].to(DTYPE), LOW).to(DTYPE, bitcast=True))
        store_rows(q_tiles, place, low + at, H * K, head, left, K)
    elif left >= 64:
        store_tile(q_tiles, place, out_tiles, row, head, K)
    else:
        store_rows(q_tiles, place, out + at, H * K, head, left, K)


@gluon.jit
def _consumer(
    W: gl.constexpr, pack, tiles, pipelines, H: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr,
    LOW: gl.constexpr,
):  # fmt: skip
    """Rows 64 W to 64 W + 63 of every item."""
    out_tiles, out, low, lse, cu_seqlens, scale_log2, T, S = pack
    DTYPE: gl.constexpr = out.dtype.element_ty
    q_tiles, k_tiles, v_tiles, message = tiles
    q_pipeline, kv_pipeline = pipelines
    q_full, q_empty = q_pipeline
    kv_full, kv_empty = kv_pipeline
    turn = 0
    count = 0
    length = next_length(message, q_full, turn)
    while length > 0:
        q_stage = turn % 2
        tma.store_wait(0)  # of the item before: its place is free
        mbarrier.arrive(q_empty.index(q_stage ^ 1), count=1, pred=turn > 0)
        first, head, row = announced(message, turn)
        row += 64 * W
        if row < length:
            place = WGS * q_stage + W
            q = tile(q_tiles, place)  # [64, 64] and [64, 16]
            if length < 64:
                consumer_wait(kv_full, count, STAGES)
                zero_values(v_tiles, count % STAGES, length, K)
            o, m, total, count = _mainloop(
                q, k_tiles, v_tiles, kv_pipeline, count, length, scale_log2, DTYPE, K, STAGES, LOW > 0
            )
            _epilogue(
                o, m, total, q_tiles, place, out_tiles, out, low, lse, T, first + row, head, length - row, H, K, LOW
            )
        else:  # the item ends before
            for _ in range(0, length, 64):
                consumer_wait(kv_full, count, STAGES)
                consumer_release(kv_empty, count, STAGES)
                count += 1
        turn += 1
        length = next_length(message, q_full, turn)
    tma.store_wait(0)

    # rows beyond the last segment, in pieces of 8 lanes
    begin = gl.load(cu_seqlens + S).to(gl.int64) * (H * K // 8)
    end = T.to(gl.int64) * (H * K // 8)
    step: gl.constexpr = 128
    for piece in range(begin + (gl.program_id(0) * WGS + W) * step, end, gl.num_programs(0) * WGS * step):
        at = piece * 8 + gl.arange(0, 8 * step, ZEROS)
        gl.store(out + at, gl.zeros([8 * step], DTYPE, ZEROS), mask=at < end * 8)


@gluon.jit(do_not_specialize=["T", "S", "blocks", "slot"], do_not_specialize_on_alignment=["cu_seqlens"])
def forward_kernel(
    q, q_tail, k, k_tail, v, v_tail, o, o_tail, out, low, lse, cu_seqlens, counters, scale_log2, T, S, blocks, slot,
    H: gl.constexpr, K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    LOW: gl.constexpr,
):  # fmt: skip
    """out = softmax(q kT) v, contiguous, and lse; the work counter `counters[slot]` is zero before and after.

    q, k, v, o are descriptors of [T, H, K] with boxes [64, 1, 64], o of `out`; tails of q and k have [64, 1, 16], of v
    and o [64, 1, 8], or are None at K = 64.
    LOW: the shift of `low_order`, whose bytes are kept in `low`, contiguous; or 0, and none are. blocks: those of
    max_seqlen rows.
    """
    DTYPE: gl.constexpr = out.dtype.element_ty
    q_tiles = allocate(DTYPE, 2 * WGS, K)  # [2 * WGS, 64, 1, 64] and [2 * WGS, 64, 1, 16]
    k_tiles = allocate(DTYPE, STAGES, K)  # [STAGES, 64, 1, 64] and [STAGES, 64, 1, 16]
    v_tiles = allocate_values(DTYPE, STAGES, K)  # [STAGES, 64, 1, 64], and sides
    tiles = (q_tiles, k_tiles, v_tiles, messages())
    pipelines = (pipeline(2, WGS, WGS), pipeline(STAGES, 2, WGS))
    fence_async_shared()
    pack = (parts(o, o_tail, K), out, low, lse, cu_seqlens, scale_log2, T, S)
    source = (parts(q, q_tail, K), parts(k, k_tail, K), parts(v, v_tail, K))
    work = (cu_seqlens, counters + slot, S, blocks)
    if WGS == 2:
        gl.warp_specialize(
            [
                (_consumer, (0, pack, tiles, pipelines, H, K, WGS, STAGES, LOW)),
                (_consumer, (1, pack, tiles, pipelines, H, K, WGS, STAGES, LOW)),
                (_producer, (source, tiles, pipelines, work, H, K, WGS, STAGES)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (0, pack, tiles, pipelines, H, K, WGS, STAGES, LOW)),
                (_consumer, (1, pack, tiles, pipelines, H, K, WGS, STAGES, LOW)),
                (_consumer, (2, pack, tiles, pipelines, H, K, WGS, STAGES, LOW)),
                (_producer, (source, tiles, pipelines, work, H, K, WGS, STAGES)),
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
    (stages, registers, of_launch, resident), shift = RESOURCES[WGS], low_order.shift(out, low)
    numbers = scale * LOG2_E, T, S, blocks, slot, H, K, WGS, stages + (K == 64), registers, shift
    arguments = *with_tails(q, k, v, out), out, low, lse, cu_seqlens, counters, *numbers
    key = q.device, q.dtype, H, K, WGS, shift
    launcher = _launchers.get(key)
    if launcher is None:
        tiles = *TILES, *TILES, *VALUES, *VALUES
        launcher = Launcher(forward_kernel, arguments, tiles, num_warps=4, maxnreg=of_launch)
        _launchers[key] = launcher
    items = H * (T // (64 * WGS) + S)  # at most
    launcher((max(1, min(items, resident * multiprocessors(q.device))), 1, 1), arguments)


_launchers: dict[tuple, Launcher] = {}
