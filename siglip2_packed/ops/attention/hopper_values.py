"""V and O of the forward for Hopper: tiles with eight lanes of ones, and of row sums, at their side.

Shapes: T rows, H heads, K head_dim.

The tensor cores multiply by any multiple of eight lanes. V has eight of ones, so O has the row sums of P there, of P as
it is rounded: O divided by them is a weighted mean of values, whose weights sum to one.

    V   main part [64, 64], and side: at K = 72 the other eight lanes of the head, then the ones, [64, 16];
        at K = 64 the ones, [64, 8], for all tiles
    O   the same, with sums for ones; it leaves as a main part and a tail, [64, 8]

Eight lanes lie in shared memory without swizzle, 64 rows of 16 bytes: two such tiles, one behind the other, are a side
of 16. The tail here is the head's own eight lanes, where those of `hopper_tiles` are sixteen.
"""

# mypy: disable-error-code="assignment"
# (a tuple grows where Triton unrolls the loop)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from siglip2_packed.ops.attention.hopper_tiles import ACC, ROWS, SHARED, TILES, finished, part, zero_rows
from siglip2_packed.ops.runtime.hopper import Tiles, barrier, copy, reinterpret, store


def _side(tiles: int) -> gl.SharedLinearLayout:
    """[64, 8 * tiles] lanes."""
    rows = [[1 << i, 0] for i in range(6)]
    return gl.SharedLinearLayout([[0, 1], [0, 2], [0, 4], *rows, *[[0, 8]] * (tiles - 1)])


EIGHT = gl.constexpr(gl.NVMMASharedLayout(0, 16, 3))  # [64 rows, 1 head, 8 lanes]
EIGHT_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0]))
SIDE = gl.constexpr({8: _side(1), 16: _side(2)})
SIDE_ACC = gl.constexpr({lanes: gl.NVMMADistributedLayout([3, 0], [4, 1], [16, lanes, 16]) for lanes in (8, 16)})

VALUES = TILES[0], Tiles([64, 1, 8], EIGHT.value)
"""Of a tensor `[T, H, K]`, and their tails."""


@gluon.jit
def own_lanes(head, K: gl.constexpr):
    """First lane of the main part, and of the tail."""
    odd = head % 2 * ((K - 64) % 16)
    return odd, 64 - odd * 8


@gluon.jit
def own_eight(side):
    """The first eight lanes of a side, for the copy engine: [64, 1, 8]."""
    return reinterpret(side, side.dtype, [64, 1, 8], EIGHT)


@gluon.jit
def allocate_values(DTYPE: gl.constexpr, STAGES: gl.constexpr, K: gl.constexpr):
    """V's main parts, [STAGES, 64, 1, 64], and sides, [STAGES, 64, 16], or [1, 64, 8] for all; with the ones."""
    SIDES: gl.constexpr = STAGES if K > 64 else 1
    mains = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 1, 64], SHARED[0])
    sides = gl.allocate_shared_memory(DTYPE, [SIDES, 64, K - 56], SIDE[K - 56])
    for i in gl.static_range(SIDES):
        sides.index(i).store(gl.full([64, K - 56], 1.0, DTYPE, EIGHT_ROWS))
    return mains, sides


@gluon.jit
def load_values(v, row, head, bar, tiles, stage, K: gl.constexpr):
    """Brings 64 rows of a head, from `row` on: [64, 1, 64] and [64, 1, 8]. `bar` waits for all of them."""
    mains, sides = tiles
    lanes = own_lanes(head, K)
    mbarrier.expect(bar, 64 * 2 * K)
    copy(v[0], [row, head, lanes[0]], bar, mains.index(stage))
    if K > 64:
        copy(v[1], [row, head, lanes[1]], bar, own_eight(sides.index(stage)))


@gluon.jit
def zero_values(tiles, stage, length, K: gl.constexpr):
    """Zeros behind the segment's rows: those of another segment are perhaps NaN."""
    mains, sides = tiles
    zero_rows(((mains,),), stage, length)
    if K > 64:
        rows = gl.arange(0, 64, gl.SliceLayout(1, EIGHT_ROWS))
        tail = own_eight(sides.index(stage)).reshape([64, 8])
        tail.store(gl.where((rows < length)[:, None], tail.load(EIGHT_ROWS), 0.0))
    fence_async_shared()
    barrier()


@gluon.jit
def no_values(K: gl.constexpr):
    """O before the first product, which does not read it: [64, 64] and [64, 16] or [64, 8]."""
    main = gl.full([64, 64], 0.0, gl.float32, ACC[0])
    return main, gl.full([64, K - 56], 0.0, gl.float32, SIDE_ACC[K - 56])


@gluon.jit
def add_values(p, tiles, stage, o, K: gl.constexpr, FIRST: gl.constexpr):
    """O + P V, V in a stage, once it is there; P V alone, if it is the first."""
    mains, sides = tiles
    v = (part((mains,), stage, 0), sides.index(stage if K > 64 else 0))
    operands, sums = (), ()
    for i in gl.static_range(2):
        operands += (gl.convert_layout(p, gl.DotOperandLayout(0, o[i].type.layout, 2)),)
    for i in gl.static_range(2):
        sums += (warpgroup_mma(operands[i], v[i], o[i], use_acc=not FIRST, is_async=True),)
    return finished(sums, operands)


@gluon.jit
def row_sums(o, K: gl.constexpr):
    """Of P, from the first of the eight lanes, all alike."""
    lane = gl.arange(0, K - 56, gl.SliceLayout(0, o[1].type.layout))
    return gl.convert_layout(gl.sum(gl.where((lane == K - 64)[None, :], o[1], 0.0), 1), gl.SliceLayout(1, ACC[0]))


@gluon.jit
def own_parts(tiles, stage, K: gl.constexpr):
    """The place of a tile of `hopper_tiles`, taken as a main part and a side: [64, 64] and [64, 16]."""
    found = (part(tiles, stage, 0),)
    if K > 64:
        found += (reinterpret(tiles[1].index(stage), tiles[1].dtype, [64, 16], SIDE[16]),)
    return found


@gluon.jit
def store_tile(tiles, stage, tensors, row, head, K: gl.constexpr):
    """Issues the store of 64 rows that lie as `own_parts`, by the copy engine; `tma.store_wait` waits for it."""
    lanes = own_lanes(head, K)
    fence_async_shared()
    barrier()
    store(tensors[0], [row, head, lanes[0]], tiles[0].index(stage))
    if K > 64:
        store(tensors[1], [row, head, lanes[1]], own_eight(tiles[1].index(stage)))


@gluon.jit
def _numbers(x, ptr):
    """As they are stored: bytes lie in shared memory as numbers of 16 bits."""
    if ptr.dtype.element_ty == gl.int8:
        x = x.to(gl.int16, bitcast=True).to(gl.int8)
    return x


@gluon.jit
def store_rows(tiles, stage, ptr, row_stride: gl.constexpr, head, left, K: gl.constexpr):
    """Stores the first `left` rows that lie as `own_parts`, from `ptr` on, in 16-byte pieces; their place is free."""
    lanes = own_lanes(head, K)
    rows = gl.arange(0, 64, gl.SliceLayout(1, ROWS[0]))
    at = rows[:, None] * row_stride + lanes[0] + gl.arange(0, 64, gl.SliceLayout(0, ROWS[0]))[None, :]
    main = part(tiles, stage, 0).load(ROWS[0])
    gl.store(ptr + at, _numbers(main, ptr), mask=(rows < left)[:, None])
    if K > 64:
        rows = gl.arange(0, 64, gl.SliceLayout(1, EIGHT_ROWS))
        at = rows[:, None] * row_stride + lanes[1] + gl.arange(0, 8, gl.SliceLayout(0, EIGHT_ROWS))[None, :]
        tail = own_eight(tiles[1].index(stage)).reshape([64, 8]).load(EIGHT_ROWS)
        gl.store(ptr + at, _numbers(tail, ptr), mask=(rows < left)[:, None])
    fence_async_shared()
