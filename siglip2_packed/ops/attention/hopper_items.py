"""What the attention kernels for Hopper (compute capability 9.0, in Gluon) share.

Shapes: T rows, H heads, K head_dim.

A tile is 64 rows of a head: 64 lanes and, for K = 72, a tail of 16. The copy engine (TMA) brings it into shared memory
and fills lanes outside [0, K) and rows outside [0, T) with zeros. Odd heads of K = 72 start in the middle of a 32-byte
sector: they have the tail in front, from lane -8, so that main tiles are always whole sectors.

A work item is a block of rows of one head of one segment. Thread blocks stay resident and draw items from an atomic
counter, long segments first, so that lengths may be mixed. In each, one warp (the producer) walks cu_seqlens to find
the items that it draws, brings their tiles, and tells the warpgroups that compute (the consumers) in a message in
shared memory which item it is.
"""

import functools
import itertools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from siglip2_packed.ops.runtime.hopper import Tiles, barrier
from siglip2_packed.ops.runtime.tracing import capturing

TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))  # as TMA writes it: [64 rows, 1 head, lanes]
TILE_TAIL = gl.constexpr(gl.NVMMASharedLayout(32, 16, 3))
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ACC_TAIL = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16-byte pieces of rows
ROWS_TAIL = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))


@gluon.jit
def cut(head, K: gl.constexpr):
    """First lanes of the main tile and of the tail."""
    odd = head % 2 * ((K - 64) % 16)
    return odd, 64 - odd * (K // 8)


@gluon.jit
def low_part(x, rounded, LOW: gl.constexpr):
    """`low_order.of`, LOW being the shift; int16."""
    rounded = rounded.to(gl.float32)
    low = (x.to(gl.int32, bitcast=True) - rounded.to(gl.int32, bitcast=True) + (1 << LOW >> 1)) >> LOW
    low = gl.minimum(gl.maximum(low, -128), 127)
    return gl.where((rounded > float("-inf")) & (rounded < float("inf")), low, 0).to(gl.int16)


@gluon.jit
def restored(out, low, LOW: gl.constexpr):
    """`low_order.restored`; float32 of `out` alone if LOW is 0."""
    x = out.to(gl.float32)
    if LOW > 0:
        x = (x.to(gl.int32, bitcast=True) + (low.to(gl.int32) << LOW)).to(gl.float32, bitcast=True)
    return x


@gluon.jit
def write(message, at, value):
    message.index(at).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def read(message, at):
    return gl.sum(message.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def tell(message, place, first, length, head, row):
    """Which item the consumers have next: the segment's first row and length, the head, the item's row in it."""
    write(message, 4 * place, first)
    write(message, 4 * place + 1, length)
    write(message, 4 * place + 2, head)
    write(message, 4 * place + 3, row)
    barrier()


@gluon.jit
def walk(
    bring: gl.constexpr, source, tiles, bars, cu_seqlens, counter, S, H, blocks,
    K: gl.constexpr, WGS: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Numbers the items of WGS * 64 rows and has `bring` bring those that fall to this thread block; returns how many.

    blocks: items of max_seqlen rows. The counter is zero before and after.
    """
    item = gl.program_id(0)
    turn = 0  # items taken
    count = 0  # tiles brought, as `bring` counts them
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
                    head = (item - begin) // own
                    row = (item - begin) % own * (64 * WGS)
                    count = bring(source, tiles, bars, first, length, head, row, turn, count, K, WGS, RING)
                    turn += 1
                    item = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
                begin = end
            first += length
            segment += 1
    if item == gl.num_programs(0) + begin - 1:  # one number was drawn for each item, this is the last
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


TILES = Tiles([64, 1, 64], TILE.value), Tiles([64, 1, 16], TILE_TAIL.value)
"""Of a tensor `[T, H, K]`, and their tails."""


def with_tails(*tensors: Tensor) -> list[Tensor | None]:
    """Each `[T, H, K]` twice, for its tiles and for their tails, or None at K = 64."""
    found: list[Tensor | None] = []
    for x in tensors:
        found += x, x if x.shape[2] > 64 else None
    return found
