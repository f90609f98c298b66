"""Tiles of the attention kernels for Hopper: how they lie in memory and in registers, products of them, their stores.

Shapes: T rows, H heads, K head_dim.

A tile is 64 rows of a head, a tuple of its parts: main, 64 lanes, and for K = 72 a tail of 16. The copy engine (TMA)
brings it into shared memory and fills lanes outside [0, K) and rows outside [0, T) with zeros. Odd heads of K = 72
start in the middle of a 32-byte sector: they have the tail in front, from lane -8, so that main parts are always whole
sectors.
"""

# mypy: disable-error-code="assignment"
# (a tuple grows where Triton unrolls the loop)

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from siglip2_packed.ops.runtime.hopper import Tiles, copy

# of a tile's main part and of its tail
LANES = gl.constexpr((64, 16))
SHARED = gl.constexpr((gl.NVMMASharedLayout(128, 16, 3), gl.NVMMASharedLayout(32, 16, 3)))  # [64 rows, 1 head, lanes]
ACC = gl.constexpr(tuple(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, lanes, 16]) for lanes in LANES.value))
ROWS = gl.constexpr(tuple(gl.BlockedLayout([1, 8], [lanes, 32 // lanes], [4, 1], [1, 0]) for lanes in (4, 16)))

ZEROS = gl.constexpr(gl.BlockedLayout([8], [32], [1], [0]))

TILES = Tiles([64, 1, 64], SHARED.value[0]), Tiles([64, 1, 16], SHARED.value[1])
"""Of a tensor `[T, H, K]`, and their tails."""


def with_tails(*tensors: Tensor) -> list[Tensor | None]:
    """Each `[T, H, K]` twice, for its tiles and for their tails, or None at K = 64."""
    found: list[Tensor | None] = []
    for x in tensors:
        found += x, x if x.shape[2] > 64 else None
    return found


@gluon.jit
def parts(main, tail, K: gl.constexpr):
    return (main, tail) if K > 64 else (main,)


@gluon.jit
def first_lanes(head, K: gl.constexpr):
    """Of the main part and of the tail."""
    odd = head % 2 * ((K - 64) % 16)
    return odd, 64 - odd * (K // 8)


@gluon.jit
def allocate(DTYPE: gl.constexpr, STAGES: gl.constexpr, K: gl.constexpr):
    """Shared memory of so many tiles: [STAGES, 64, 1, 64] and [STAGES, 64, 1, 16]."""
    stages = ()
    for i in gl.static_range(2 if K > 64 else 1):
        stages += (gl.allocate_shared_memory(DTYPE, [STAGES, 64, 1, LANES[i]], SHARED[i]),)
    return stages


@gluon.jit
def part(stages, stage, i: gl.constexpr):
    """A part of the tile in a stage: [64, 64] or [64, 16]."""
    return stages[i].index(stage).reshape([64, LANES[i]])


@gluon.jit
def tile(stages, stage):
    """That in a stage: [64, 64] and [64, 16]."""
    found = ()
    for i in gl.static_range(len(stages)):
        found += (part(stages, stage, i),)
    return found


@gluon.jit
def tile_pair(stages, others, stage):
    """Those in a stage of two tensors."""
    found, other = (), ()
    for i in gl.static_range(len(stages)):
        found += (part(stages, stage, i),)
        other += (part(others, stage, i),)
    return found, other


@gluon.jit
def load(tensors, row, head, lanes, bar, tiles, stage, K: gl.constexpr, pred=True):
    """Brings 64 rows of a head of each, from `row` on: [64, 1, 64] and [64, 1, 16]. `bar` waits for all of them."""
    mbarrier.expect(bar, len(tensors) * 64 * 2 * (80 if K > 64 else 64), pred=pred)
    for x in gl.static_range(len(tensors)):
        places = ()
        for i in gl.static_range(len(tensors[x])):
            places += (tiles[x][i].index(stage),)
        for i in gl.static_range(len(tensors[x])):
            copy(tensors[x][i], [row, head, lanes[i]], bar, places[i], pred=pred)


@gluon.jit
def within(start, length):
    """First row of the tile that begins at `start`, moved back to end within the segment."""
    return gl.maximum(gl.minimum(start, length - 64), 0)


@gluon.jit
def zero_rows(tiles, stage, length):
    """Zeros behind the segment's rows of each tile: those of another segment are perhaps NaN."""
    for i in gl.static_range(len(tiles[0])):
        for x in gl.static_range(len(tiles)):
            rows = gl.arange(0, 64, gl.SliceLayout(1, ROWS[i]))
            tile_part = part(tiles[x], stage, i)
            tile_part.store(gl.where((rows < length)[:, None], tile_part.load(ROWS[i]), 0.0))


@gluon.jit
def zeros(K: gl.constexpr):
    """Of an accumulator: [64, 64] and [64, 16]."""
    acc = ()
    for i in gl.static_range(2 if K > 64 else 1):
        acc += (gl.full([64, LANES[i]], 0.0, gl.float32, ACC[i]),)
    return acc


@gluon.jit
def product(a, stages, stage):
    """Issues a bT of two tiles, b that in a stage: [64, 64]."""
    acc = gl.full([64, 64], 0.0, gl.float32, ACC[0])
    for i in gl.static_range(len(a)):
        acc = warpgroup_mma(a[i], part(stages, stage, i).permute((1, 0)), acc, use_acc=i > 0, is_async=True)
    return acc


@gluon.jit
def accumulate(x, stages, stage, acc):
    """Issues acc + x b, x [64, 64], b the tile in a stage. Also returns x's registers, which the wait must keep."""
    operands = ()
    for i in gl.static_range(len(acc)):
        operands += (gl.convert_layout(x, gl.DotOperandLayout(0, ACC[i], 2)),)
    sums = ()
    for i in gl.static_range(len(acc)):
        sums += (warpgroup_mma(operands[i], part(stages, stage, i), acc[i], is_async=True),)
    return sums, operands


@gluon.jit
def finished(sums, operands):
    """What `accumulate` has issued, once all that was issued is there."""
    done = warpgroup_mma_wait(0, sums + operands)
    acc = ()
    for i in gl.static_range(len(sums)):
        acc += (done[i],)
    return acc


@gluon.jit
def finished_both(sums, others, operands):
    """The same of two."""
    done = warpgroup_mma_wait(0, sums + others + operands)
    acc, other = (), ()
    for i in gl.static_range(len(sums)):
        acc += (done[i],)
        other += (done[len(sums) + i],)
    return acc, other


@gluon.jit
def scaled(x, by):
    """An accumulator times a number."""
    found = ()
    for i in gl.static_range(len(x)):
        found += (x[i] * by,)
    return found


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
def indices(K: gl.constexpr):
    """Rows, and lanes, of a tile's parts as they are stored: 64, and 64 or 16."""
    rows, lanes = (), ()
    for i in gl.static_range(2 if K > 64 else 1):
        rows += (gl.arange(0, 64, gl.SliceLayout(1, ROWS[i])),)
    for i in gl.static_range(len(rows)):
        lanes += (gl.arange(0, LANES[i], gl.SliceLayout(0, ROWS[i])),)
    return rows, lanes


@gluon.jit
def elements(i: gl.constexpr, index, begin, row_stride: gl.constexpr, first_lane, left, K: gl.constexpr):
    """Where a part's elements are in memory, and which of them are of the segment's `left` rows and of the head."""
    rows, lanes = index[0][i], index[1][i]
    if i == 0:
        real = (rows < left)[:, None]
        places = begin + rows[:, None] * row_stride + first_lane + lanes[None, :]
    else:
        lanes += first_lane
        real = (rows < left)[:, None] & ((lanes >= 0) & (lanes < K))[None, :]
        places = begin + rows[:, None] * row_stride + lanes[None, :]
    return places, real


@gluon.jit
def store(x, through, ptr, row_stride: gl.constexpr, lanes, left, K: gl.constexpr):
    """Stores the first `left` rows of an accumulator, through a tile in shared memory, in 16-byte pieces."""
    for i in gl.static_range(len(x)):
        through[i].store(x[i].to(ptr.dtype.element_ty))
    for i in gl.static_range(len(x)):
        places, real = elements(i, indices(K), ptr, row_stride, lanes[i], left, K)
        gl.store(places, through[i].load(ROWS[i]), mask=real)


@gluon.jit
def zero_rows_beyond(x, sxt: gl.constexpr, lanes, first, T):
    """Zeros in rows [first, T): a thread block's part, by one warp."""
    here = gl.arange(0, 256, ZEROS)
    for row in range(first + gl.program_id(0), T, gl.num_programs(0)):
        for lane in range(0, lanes, 256):
            at = x + gl.cast(row, gl.int64) * sxt + lane + here
            gl.store(at, gl.zeros([256], x.dtype.element_ty, ZEROS), mask=here < lanes - lane)
