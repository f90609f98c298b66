"""The MLP's wide linear layer on Hopper (compute capability 9.0, in Gluon), GELU (tanh form) in its epilogue.

Shapes: T rows, D columns of x, F columns of the wide layer.

    linear_gelu           active = gelu(x Wᵀ + b)                                    inference
    linear_gelu_keep      wide = x Wᵀ + b, active = gelu(wide)                       training, forward
    linear_gelu_backward  dwide = (dout W) gelu'(wide), active = gelu(wide), sums of dwide's columns

Thread blocks stay resident, one a multiprocessor, and take output tiles in turn. One warp (the producer) brings tiles
of x and of the weight, 64 columns of the contraction at a time, through the copy engine (TMA) into a ring of slots, and
runs ahead into the next output tile. Two warpgroups (the consumers) multiply, each a tile of its own and by turns, so
that the tensor cores work for one while the other is in its epilogue.

The epilogue goes by pieces of 64 columns, through shared memory to the copy engine, which leaves out what is beyond the
last row and column. `wide` of the backward comes through the copy engine too, and results take its place in shared
memory. Each tile is read before it is written, so `active` may overwrite `wide`. The sums are one row of partial sums
for each tile of rows: every result is deterministic.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from siglip2_packed.ops.runtime import gelu, hopper
from siglip2_packed.ops.runtime.fold import fold
from siglip2_packed.ops.runtime.hopper import Launcher, Tiles
from siglip2_packed.ops.runtime.hopper_product import (
    CONSUMER_REGISTERS,
    MAX_REGISTERS,
    PIECE,
    PRODUCER_REGISTERS,
    TILE,
    corner,
    multiply,
    pieces,
    save,
    save_sum,
    sigmoid,
)
from siglip2_packed.ops.runtime.launch import ceil_div, multiprocessors

EPILOGUES = {"gelu": 0, "keep": 1, "backward": 2}
KEEP, BACKWARD = gl.constexpr(1), gl.constexpr(2)

SLOPE, CUBIC_3 = gl.constexpr(gelu.SLOPE), gl.constexpr(3 * gelu.CUBIC)


class Plan(NamedTuple):
    """How the work is cut; compile-time constants."""

    rows: int
    columns: int  # of an output tile
    group: int  # rows of tiles that are gone through column by column
    slots: int  # of the ring
    stages: int  # pieces of a warpgroup on their way to memory; 0 where they take the place of wide


PLANS = {  # the fastest of eight on an H100, D = 1152, F = 4304
    "gelu": Plan(64, 256, 16, 4, 4),
    "keep": Plan(128, 128, 8, 5, 2),
    "backward": Plan(128, 128, 16, 5, 0),
}


@gluon.jit
def _gelu_and_slope(u):
    """gelu(u) and gelu'(u)."""
    square = u * u
    s = sigmoid(u, square)
    active = u * s
    return active, s + (active - active * s) * (SLOPE + CUBIC_3 * square)


@gluon.jit
def _producer(
    source, tiles, bars, T, D: gl.constexpr, F: gl.constexpr, EPILOGUE: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    x, weight, wide = source
    sx, sw, s_wide, _ = tiles
    full, empty, wide_full, wide_empty, _ = bars
    STEPS: gl.constexpr = (D + 63) // 64
    PIECES: gl.constexpr = COLUMNS // 64
    tiles_in_all = (T + ROWS - 1) // ROWS * ((F + COLUMNS - 1) // COLUMNS)
    count = 0
    turn = 0
    for number in range(gl.program_id(0), tiles_in_all, gl.num_programs(0)):
        row, column = corner(number, T, (F + COLUMNS - 1) // COLUMNS, ROWS, COLUMNS, GROUP)
        for step in range(STEPS):
            slot = count % SLOTS
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), count // SLOTS % 2 ^ 1)
            mbarrier.expect(bar, (ROWS + COLUMNS) * 128)
            hopper.copy(x, [row, 64 * step], bar, sx.index(slot))
            if EPILOGUE == BACKWARD:
                hopper.copy(weight, [64 * step, column], bar, sw.index(slot))
            else:
                hopper.copy(weight, [column, 64 * step], bar, sw.index(slot))
            count += 1
            if EPILOGUE == BACKWARD:  # noqa: SIM102 (the outer is decided at compile time)
                if step == STEPS // 2:  # by now its place is free, and there is time enough until the epilogue
                    w = turn % 2
                    mbarrier.wait(wide_empty.index(w), turn // 2 % 2 ^ 1)
                    mbarrier.expect(wide_full.index(w), ROWS * COLUMNS * 2)
                    for piece in gl.static_range(PIECES):
                        at = s_wide.index(w * PIECES + piece)
                        hopper.copy(wide, [row, column + 64 * piece], wide_full.index(w), at)
        turn += 1  # noqa: SIM113


@gluon.jit
def _backward_epilogue(
    W: gl.constexpr, acc, active, dwide, sums, s_wide, row, column, F: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = active.dtype
    parts = pieces(acc)
    gl.static_assert(len(parts) == 2)
    u_1 = s_wide.index(2 * W + 1).load(PIECE)  # all of wide is read before results take its two places
    for piece in gl.static_range(2):
        at = column + 64 * piece
        u = u_1 if piece else s_wide.index(2 * W).load(PIECE)
        if piece:
            tma.store_wait(0)
        a, slope = _gelu_and_slope(u.to(gl.float32))
        d = parts[piece] * slope
        save(a.to(DTYPE), active, row, at, s_wide, 2 * W)
        save(d.to(DTYPE), dwide, row, at, s_wide, 2 * W + 1)
        columns = at + gl.arange(0, 64, gl.SliceLayout(0, PIECE))
        gl.store(sums + row // ROWS * F + columns, gl.sum(d, 0), mask=columns < F)


@gluon.jit
def _consumer(
    W: gl.constexpr, out, tiles, bars, T, D: gl.constexpr, F: gl.constexpr, EPILOGUE: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    bias, wide, active, dwide, sums = out
    sx, sw, s_wide, stages = tiles
    full, empty, wide_full, wide_empty, order = bars
    STEPS: gl.constexpr = (D + 63) // 64
    tiles_in_all = (T + ROWS - 1) // ROWS * ((F + COLUMNS - 1) // COLUMNS)
    count = W * STEPS
    turn = 0
    for number in range(gl.program_id(0) + W * gl.num_programs(0), tiles_in_all, 2 * gl.num_programs(0)):
        row, column = corner(number, T, (F + COLUMNS - 1) // COLUMNS, ROWS, COLUMNS, GROUP)
        acc = multiply(W, sx, sw, full, empty, order, count, turn, STEPS, ROWS, COLUMNS, EPILOGUE != BACKWARD, SLOTS)
        if EPILOGUE == BACKWARD:
            mbarrier.wait(wide_full.index(W), turn % 2)
            _backward_epilogue(W, acc, active, dwide, sums, s_wide, row, column, F, ROWS)
            tma.store_wait(0)
            mbarrier.arrive(wide_empty.index(W), count=1)
        else:
            save_sum(acc, bias, wide, active, stages, W * STAGES, row, column, F, STAGES)
        count += 2 * STEPS
        turn += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def mlp_kernel(
    x, weight, bias, wide, active, dwide, sums, T, D: gl.constexpr, F: gl.constexpr, EPILOGUE: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """x, weight, wide, active and dwide are descriptors; what an epilogue does not have is None."""
    DTYPE: gl.constexpr = active.dtype
    sx = gl.allocate_shared_memory(DTYPE, [SLOTS, ROWS, 64], TILE)
    if EPILOGUE == BACKWARD:
        sw = gl.allocate_shared_memory(DTYPE, [SLOTS, 64, COLUMNS], TILE)
        s_wide = gl.allocate_shared_memory(DTYPE, [2 * (COLUMNS // 64), ROWS, 64], TILE)
        stages = s_wide
    else:
        sw = gl.allocate_shared_memory(DTYPE, [SLOTS, COLUMNS, 64], TILE)
        stages = gl.allocate_shared_memory(DTYPE, [2 * STAGES, ROWS, 64], TILE)
        s_wide = stages
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    wide_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    wide_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(wide_full.index(i), count=1)
        mbarrier.init(wide_empty.index(i), count=1)
        mbarrier.init(order.index(i), count=1)
    fence_async_shared()
    tiles = (sx, sw, s_wide, stages)
    bars = (full, empty, wide_full, wide_empty, order)
    source = (x, weight, wide)
    out = (bias, wide, active, dwide, sums)
    gl.warp_specialize(
        [
            (_consumer, (0, out, tiles, bars, T, D, F, EPILOGUE, ROWS, COLUMNS, GROUP, SLOTS, STAGES)),
            (_consumer, (1, out, tiles, bars, T, D, F, EPILOGUE, ROWS, COLUMNS, GROUP, SLOTS, STAGES)),
            (_producer, (source, tiles, bars, T, D, F, EPILOGUE, ROWS, COLUMNS, GROUP, SLOTS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, place: Tensor | None = None, blocks: int = 0) -> Tensor:
    """See `mlp.eager`. Runs on one thread block a multiprocessor, where no other number of `blocks` is asked for."""
    active = x.new_empty(len(x), len(weight)) if place is None else place
    _launch("gelu", x, weight, bias, None, active, None, None, blocks)
    return active


def linear_gelu_keep(x: Tensor, weight: Tensor, bias: Tensor, blocks: int = 0) -> tuple[Tensor, Tensor]:
    """See `mlp.eager`."""
    wide, active = (x.new_empty(len(x), len(weight)) for _ in range(2))
    _launch("keep", x, weight, bias, wide, active, None, None, blocks)
    return wide, active


def linear_gelu_backward(
    dout: Tensor, weight: Tensor, wide: Tensor, active: Tensor, blocks: int = 0
) -> tuple[Tensor, Tensor]:
    """See `mlp.eager`."""
    (T, F), dwide = wide.shape, torch.empty_like(wide)
    sums = torch.empty((ceil_div(T, PLANS["backward"].rows), F), dtype=torch.float32, device=wide.device)
    _launch("backward", dout, weight, None, wide, active, dwide, sums, blocks)
    return dwide, fold(sums, wide.dtype)


def _launch(
    epilogue: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wide: Tensor | None,
    active: Tensor,
    dwide: Tensor | None,
    sums: Tensor | None,
    blocks: int,
) -> None:
    x, weight = hopper.in_reach(x, weight)
    bias = bias if bias is None else hopper.in_reach(bias)[0]
    (T, D), F, plan = x.shape, active.shape[1], PLANS[epilogue]
    if weight.shape != ((D, F) if epilogue == "backward" else (F, D)):  # the copy engine would read zeros beyond
        raise ValueError(f"a weight {list(weight.shape)} does not take rows [{T}, {D}] to [{T}, {F}]")
    arguments = x, weight, bias, wide, active, dwide, sums, T, D, F, EPILOGUES[epilogue], *plan
    key = x.device, x.dtype, D, F, epilogue
    launcher = _launchers.get(key)
    if launcher is None:
        rows = Tiles([plan.rows, 64], TILE.value)
        of_weight = Tiles([64, plan.columns] if epilogue == "backward" else [plan.columns, 64], TILE.value)
        tiles = rows, of_weight, None, rows, rows, rows
        launcher = Launcher(mlp_kernel, arguments, tiles, num_warps=4, maxnreg=MAX_REGISTERS)
        _launchers[key] = launcher
    tiles_in_all = ceil_div(T, plan.rows) * ceil_div(F, plan.columns)
    launcher((min(tiles_in_all, blocks or multiprocessors(x.device)), 1, 1), arguments)


_launchers: dict[tuple, Launcher] = {}
