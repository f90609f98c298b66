"""What products on Hopper share (compute capability 9.0, in Gluon): how tiles lie, and a result's way to memory.

A warpgroup has 64 or 128 rows of a result and 64, 128 or 256 columns in its registers. They leave it by pieces of 64
columns, through shared memory to the copy engine, which leaves out what is beyond the last row and column.

Shapes: T rows, F columns of the result.
"""

# mypy: disable-error-code="assignment"
# (pieces are as many as the columns make)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from siglip2_packed.ops.runtime import gelu, hopper

PRODUCER_REGISTERS = gl.constexpr(24)
CONSUMER_REGISTERS = gl.constexpr(240)
MAX_REGISTERS = 168  # of the launch

TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # as TMA writes it, and as products read it
PIECE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))

SLOPE_LOG2, CUBIC_LOG2 = gl.constexpr(gelu.SLOPE_LOG2), gl.constexpr(gelu.CUBIC_LOG2)

TO_BF16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
TO_FP16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def rounded(x, DTYPE: gl.constexpr):
    """x.to(DTYPE) by pairs, also where the result is used in float32 (the compiler would convert each by itself)."""
    if gl.bfloat16 == DTYPE:
        y = gl.inline_asm_elementwise(TO_BF16, "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        y = gl.inline_asm_elementwise(TO_FP16, "=r,f,f", [x], dtype=gl.float16, is_pure=True, pack=2)
    return y


@gluon.jit
def sigmoid(u, square):
    """sigmoid(2z), z as in `gelu`."""
    return _reciprocal(1.0 + _exp2(u * (SLOPE_LOG2 + CUBIC_LOG2 * square)))


@gluon.jit
def _halves(x):
    """Left and right half of the columns, without any data moved."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1] // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    left, right = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, COLUMNS]), [0, 2, 1]))
    return gl.convert_layout(left, LAYOUT), gl.convert_layout(right, LAYOUT)


@gluon.jit
def pieces(x):
    """64, 128 or 256 columns cut into pieces of 64."""
    if x.shape[1] == 64:
        found = (x,)
    elif x.shape[1] == 128:
        left, right = _halves(x)
        found = left, right
    else:
        left, right = _halves(x)
        a, b = _halves(left)
        c, d = _halves(right)
        found = a, b, c, d
    return found


@gluon.jit
def corner(number, T, ACROSS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr):
    """First row and column of a tile, ACROSS side by side: groups of rows of tiles, in each column by column."""
    first = number // (GROUP * ACROSS) * GROUP
    inside = number % (GROUP * ACROSS)
    height = gl.minimum((T + ROWS - 1) // ROWS - first, GROUP)
    return (first + inside % height) * ROWS, inside // height * COLUMNS


@gluon.jit
def _issue(
    sx, sw, full, count, acc, use_acc: gl.constexpr, WIDTH: gl.constexpr, BY_ROWS: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """Issues the products of the step in slot number `count`, when it is there."""
    slot = count % SLOTS
    b = sw.index(slot)
    if BY_ROWS:
        if b.shape[0] > WIDTH:
            b = b.slice(0, WIDTH)
        b = b.permute((1, 0))
    mbarrier.wait(full.index(slot), count // SLOTS % 2)
    return warpgroup_mma(sx.index(slot), b, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def multiply(
    W: gl.constexpr, sx, sw, full, empty, order, count, turn, STEPS: gl.constexpr, ROWS: gl.constexpr,
    WIDTH: gl.constexpr, BY_ROWS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The product of a warpgroup's tile, from slot number `count` of the ring on; it takes turns with the other.

    BY_ROWS: a slot has WIDTH rows of the weight, or more, and 64 of its columns; else 64 rows and WIDTH columns.
    """
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    acc = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
    # The tensor cores are handed over; nobody may wait for a slot's next filling but one, which a barrier cannot tell
    # from the last.
    mbarrier.wait(order.index(W), (turn + 1 - W) % 2)
    acc = _issue(sx, sw, full, count, acc, False, WIDTH, BY_ROWS, SLOTS)
    acc = warpgroup_mma_wait(1, [acc])
    for step in range(1, STEPS - 1):
        acc = _issue(sx, sw, full, count + step, acc, True, WIDTH, BY_ROWS, SLOTS)
        acc = warpgroup_mma_wait(1, [acc])
        mbarrier.arrive(empty.index((count + step - 1) % SLOTS), count=1)
    last = count + STEPS - 1
    if STEPS > 1:
        acc = _issue(sx, sw, full, last, acc, True, WIDTH, BY_ROWS, SLOTS)
    mbarrier.arrive(order.index(1 - W), count=1)
    if STEPS > 1:
        acc = warpgroup_mma_wait(1, [acc])
        mbarrier.arrive(empty.index((last - 1) % SLOTS), count=1)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(empty.index(last % SLOTS), count=1)
    return acc


@gluon.jit
def save(x, target, row, column, stages, stage):
    """Stores a piece through shared memory, by the copy engine, which goes on reading there."""
    at = stages.index(stage)
    at.store(x)
    fence_async_shared()
    hopper.store(target, [row, column], at)


@gluon.jit
def save_sum(acc, bias, out, active, stages, first, row, column, F: gl.constexpr, STAGES: gl.constexpr):
    """u = acc + bias goes to `out`, gelu(u) to `active`; gelu of the rounded u where there are both, None where one is.

    By turns through the STAGES stages from `first` on.
    """
    DTYPE: gl.constexpr = bias.dtype.element_ty
    EACH: gl.constexpr = (out is not None) + (active is not None)
    parts = pieces(acc)
    for piece in gl.static_range(len(parts)):
        at = column + 64 * piece
        columns = at + gl.arange(0, 64, gl.SliceLayout(0, PIECE))
        u = parts[piece] + gl.load(bias + columns, mask=columns < F, other=0.0).to(gl.float32)[None, :]
        if out is not None:
            u = rounded(u, DTYPE)
            tma.store_wait(STAGES - 1)
            save(u, out, row, at, stages, first + EACH * piece % STAGES)
        if active is not None:
            u = u.to(gl.float32)
            tma.store_wait(STAGES - 1)
            save((u * sigmoid(u, u * u)).to(DTYPE), active, row, at, stages, first + (EACH * piece + EACH - 1) % STAGES)
    if EACH * len(parts) % STAGES:  # else the next would begin at the stage that was stored last
        tma.store_wait(0)
