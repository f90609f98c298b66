"""The tile scheduler of the attention kernels for Hopper (compute capability 9.0, in Gluon), and their pipelines.

Shapes: S segments, H heads, K head_dim.

A work item is a block of rows of one head of one segment. Thread blocks stay resident and draw items from an atomic
counter, long segments first, so that lengths may be mixed. In each, one warp (the producer) walks cu_seqlens to find
the items that it draws, brings their tiles, and tells the warpgroups that compute (the consumers) in a message in
shared memory which item it is.

Tiles go through pipelines. The n-th has stage n % STAGES, and waits there for phase n // STAGES & 1 of the stage's two
barriers: the consumers for `full`, the producer, to bring one, for the phase before of `empty`.
"""

import functools
import itertools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from siglip2_packed.ops.runtime.hopper import barrier
from siglip2_packed.ops.runtime.tracing import capturing

VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def pipeline(STAGES: gl.constexpr, full: gl.constexpr, empty: gl.constexpr):
    """Barriers `full` and `empty` of each stage, which complete after so many arrivals: [STAGES, 1]."""
    fulls = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empties = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(fulls.index(i), count=full)
        mbarrier.init(empties.index(i), count=empty)
    return fulls, empties


@gluon.jit
def barriers(STAGES: gl.constexpr):
    """One of each stage, which completes after one arrival: [STAGES, 1]."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    return full


@gluon.jit
def producer_acquire(bars, count, STAGES: gl.constexpr):
    """Waits until the stage of the next tile, behind `count` others, is free; returns the barrier that waits for it."""
    full, empty = bars
    bar = full.index(count % STAGES)
    mbarrier.wait(empty.index(count % STAGES), (count // STAGES & 1) ^ 1)
    return bar


@gluon.jit
def consumer_wait(full, count, STAGES: gl.constexpr):
    """Waits until the tile behind `count` others is there."""
    mbarrier.wait(full.index(count % STAGES), count // STAGES & 1)


@gluon.jit
def consumer_release(empty, count, STAGES: gl.constexpr):
    mbarrier.arrive(empty.index(count % STAGES), count=1)


@gluon.jit
def messages():
    """Of an item and of the next, five numbers each: [10, 1]."""
    return gl.allocate_shared_memory(gl.int32, [10, 1], VECTOR)


@gluon.jit
def write(message, at, value):
    message.index(at).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def read(message, at, WARPS: gl.constexpr = 4):
    return gl.sum(message.index(at).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def announce(message, turn, first, length, head, row, tile=None):
    """Which item the consumers have next: the segment's first row and length, the head, the item's row in it.

    And the number of the segment's first tile, where tiles are numbered.
    """
    at = turn % 2 * 5
    write(message, at, first)
    write(message, at + 1, length)
    write(message, at + 2, head)
    write(message, at + 3, row)
    if tile is not None:
        write(message, at + 4, tile)
    barrier()


@gluon.jit
def announce_end(message, turn):
    write(message, turn % 2 * 5 + 1, 0)
    barrier()


@gluon.jit
def announced_length(message, turn, WARPS: gl.constexpr = 4):
    """That of the item's segment; 0 behind the last item."""
    return read(message, turn % 2 * 5 + 1, WARPS)


@gluon.jit
def next_length(message, item_full, turn, WARPS: gl.constexpr = 4):
    """`announced_length`, once it is announced."""
    consumer_wait(item_full, turn, 2)
    return announced_length(message, turn, WARPS)


@gluon.jit
def announced(message, turn):
    """The segment's first row, the head, and the item's row in the segment."""
    at = turn % 2 * 5
    return read(message, at), read(message, at + 2), read(message, at + 3)


@gluon.jit
def announced_tile(message, turn, WARPS: gl.constexpr):
    """The item's row in the segment, and the number of the segment's first tile."""
    at = turn % 2 * 5
    return read(message, at + 3, WARPS), read(message, at + 4, WARPS)


@gluon.jit
def schedule(
    load_item: gl.constexpr, source, tiles, bars, cu_seqlens, counter, S, H, blocks,
    K: gl.constexpr, WGS: gl.constexpr, STAGES: gl.constexpr, ACROSS: gl.constexpr = False,
):  # fmt: skip
    """Numbers the items of WGS * 64 rows, has `load_item` bring those that fall to this thread block, returns how many.

    Blocks of a head follow each other; or, ACROSS, heads of a block do, and every item is drawn, the first one too, so
    that a head's earlier blocks are under way. blocks: items of max_seqlen rows. The counter is zero before and after.
    """
    item = gl.atomic_add(counter, 1, sem="relaxed") if ACROSS else gl.program_id(0)
    turn = 0  # items taken
    count = 0  # tiles brought, as `load_item` counts them
    begin = 0  # number of the segment's first item
    last = gl.load(cu_seqlens + S)
    left = last  # rows whose items are not numbered yet
    for late in range(2):  # the segments of more than half of max_seqlen, then the others
        segment = 0
        first = 0
        while (first < last) & (left > 0):
            length = gl.load(cu_seqlens + segment + 1) - first
            own = (length + 64 * WGS - 1) // (64 * WGS)  # blocks of this segment
            if (2 * own <= blocks) == (late == 1):
                left -= length
                end = begin + own * H
                while item < end:
                    head = (item - begin) % H if ACROSS else (item - begin) // own
                    row = ((item - begin) // H if ACROSS else (item - begin) % own) * (64 * WGS)
                    count = load_item(
                        source, tiles, bars, first, length, head, row, segment, turn, count, K, WGS, STAGES
                    )  # fmt: skip
                    turn += 1
                    item = gl.atomic_add(counter, 1, sem="relaxed") + (0 if ACROSS else gl.num_programs(0))
                begin = end
            first += length
            segment += 1
    if item == gl.num_programs(0) + begin - 1:  # the last number that is drawn
        gl.store(counter, 0)
    return turn


# Launches that may overlap must not share a work counter: eager ones take turns; one captured in a CUDA graph, which
# may run at any time, keeps its own for good, or has one made and zeroed with every replay once all are taken.
EAGER, COUNTERS = 1 << 14, 1 << 18
_eager, _captured = itertools.count(), itertools.count(EAGER)


def work_counter(device: torch.device) -> tuple[Tensor, int]:
    """Counters, all zero before and after a launch, and the number of that of this launch."""
    if not capturing(device):
        return _counters(device), next(_eager) % EAGER
    slot = next(_captured)
    return (_counters(device), slot) if slot < COUNTERS else (torch.zeros(1, dtype=torch.int32, device=device), 0)


@functools.cache
def _counters(device: torch.device) -> Tensor:
    zeros = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)  # launches on other streams count on the zeros
    return zeros
