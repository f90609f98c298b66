"""Products of rows with a weight on Hopper (compute capability 9.0, in Gluon): `linear.triton`'s functions, with the
same reason why what a row gives does not depend on the others.

Thread blocks stay resident, one a multiprocessor, and take tiles of the result in turn. One warp (the producer) brings
tiles of x and of the weight, 64 columns of the contraction at a time, through the copy engine (TMA) into a ring of
slots, and runs ahead into the next tile. Two warpgroups (the consumers) multiply, each a tile of its own and by turns,
in one float32 accumulator from the beginning of the contraction to its end.

What is added comes through the copy engine too, and the sum takes its place in shared memory. Columns beyond a multiple
of a tile's make half a tile, if that is enough for them; such halves are taken last.

Shapes: T rows, D columns in, F columns out.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from siglip2_packed.ops.runtime import choice, hopper
from siglip2_packed.ops.runtime.choice import HopperTile
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
    rounded,
    save,
    save_sum,
)
from siglip2_packed.ops.runtime.launch import ceil_div, multiprocessors

GROUP = 1024
"""Rows that are gone through column by column of tiles: what they read stays in the cache."""
SLOTS = 12
"""At most."""
SHARED_MEMORY = 226 * 1024
"""Of a block, but for barriers."""

tiles = choice.hopper_tiles


@gluon.jit
def _corner(number, T, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WHOLE: gl.constexpr, GROUP: gl.constexpr):
    """First row and column of a tile; after the whole ones, WHOLE side by side, come the halves."""
    row, column = corner(number, T, WHOLE, ROWS, COLUMNS, GROUP)
    halves = number - (T + ROWS - 1) // ROWS * WHOLE
    return gl.where(halves < 0, row, halves * ROWS), gl.where(halves < 0, column, WHOLE * COLUMNS)


@gluon.jit
def _producer(
    source, tiles, bars, T, D: gl.constexpr, F: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    WHOLE: gl.constexpr, GROUP: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    x, weight, added = source
    sx, sw, places = tiles
    full, empty, _, added_full, added_empty = bars
    STEPS: gl.constexpr = (D + 63) // 64
    PIECES: gl.constexpr = COLUMNS // 64
    tiles_in_all = (T + ROWS - 1) // ROWS * ((F + COLUMNS - 1) // COLUMNS)
    count = 0
    turn = 0
    for number in range(gl.program_id(0), tiles_in_all, gl.num_programs(0)):
        row, column = _corner(number, T, ROWS, COLUMNS, WHOLE, GROUP)
        for step in range(STEPS):
            slot = count % SLOTS
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), count // SLOTS % 2 ^ 1)
            mbarrier.expect(bar, (ROWS + COLUMNS) * 128)
            hopper.copy(x, [row, 64 * step], bar, sx.index(slot))
            hopper.copy(weight, [column, 64 * step], bar, sw.index(slot))
            count += 1
            if added is not None:  # noqa: SIM102 (the outer is decided at compile time)
                if step == STEPS // 2:  # by now its place is free, and there is time enough until the epilogue
                    W = turn % 2
                    mbarrier.wait(added_empty.index(W), turn // 2 % 2 ^ 1)
                    mbarrier.expect(added_full.index(W), ROWS * COLUMNS * 2)
                    for piece in gl.static_range(PIECES):
                        at = places.index(W * PIECES + piece)
                        hopper.copy(added, [row, column + 64 * piece], added_full.index(W), at)
        turn += 1  # noqa: SIM113


@gluon.jit
def _add(acc, out, places, first, row, column):
    """Adds what is in the places, from `first` on, and stores the sum from there."""
    DTYPE: gl.constexpr = places.dtype
    parts = pieces(acc)
    for piece in gl.static_range(len(parts)):
        u = parts[piece] + places.index(first + piece).load(PIECE).to(gl.float32)
        save(rounded(u, DTYPE), out, row, column + 64 * piece, places, first + piece)


@gluon.jit
def _tile(
    W: gl.constexpr, result, tiles, bars, row, column, count, turn, D: gl.constexpr, F: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, WIDTH: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """A tile of WIDTH columns."""
    bias, out, active = result
    sx, sw, places = tiles
    full, empty, order, added_full, added_empty = bars
    PIECES: gl.constexpr = COLUMNS // 64
    acc = multiply(W, sx, sw, full, empty, order, count, turn, (D + 63) // 64, ROWS, WIDTH, True, SLOTS)
    if bias is None:
        mbarrier.wait(added_full.index(W), turn % 2)
        _add(acc, out, places, W * PIECES, row, column)
        tma.store_wait(0)
        mbarrier.arrive(added_empty.index(W), count=1)
    else:
        save_sum(acc, bias, out, active, places, W * PIECES, row, column, F, PIECES)


@gluon.jit
def _consumer(
    W: gl.constexpr, result, tiles, bars, T, D: gl.constexpr, F: gl.constexpr, ROWS: gl.constexpr,
    COLUMNS: gl.constexpr, WHOLE: gl.constexpr, GROUP: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    ACROSS: gl.constexpr = (F + COLUMNS - 1) // COLUMNS
    STEPS: gl.constexpr = (D + 63) // 64
    tiles_in_all = (T + ROWS - 1) // ROWS * ACROSS
    count = W * STEPS
    turn = 0
    for number in range(gl.program_id(0) + W * gl.num_programs(0), tiles_in_all, 2 * gl.num_programs(0)):
        row, column = _corner(number, T, ROWS, COLUMNS, WHOLE, GROUP)
        if column < WHOLE * COLUMNS:
            _tile(W, result, tiles, bars, row, column, count, turn, D, F, ROWS, COLUMNS, COLUMNS, SLOTS)
        if WHOLE < ACROSS:  # noqa: SIM102 (the outer is decided at compile time)
            if column >= WHOLE * COLUMNS:
                _tile(W, result, tiles, bars, row, column, count, turn, D, F, ROWS, COLUMNS, COLUMNS // 2, SLOTS)
        count += 2 * STEPS
        turn += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def product_kernel(
    x, weight, bias, added, out, active, T, D: gl.constexpr, F: gl.constexpr, ROWS: gl.constexpr,
    COLUMNS: gl.constexpr, WHOLE: gl.constexpr, GROUP: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """x, weight, added, out and active are descriptors. `added` goes without a bias; what there is not is None."""
    DTYPE: gl.constexpr = x.dtype
    sx = gl.allocate_shared_memory(DTYPE, [SLOTS, ROWS, 64], TILE)
    sw = gl.allocate_shared_memory(DTYPE, [SLOTS, COLUMNS, 64], TILE)
    places = gl.allocate_shared_memory(DTYPE, [2 * (COLUMNS // 64), ROWS, 64], TILE)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    added_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    added_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
        mbarrier.init(added_full.index(i), count=1)
        mbarrier.init(added_empty.index(i), count=1)
    fence_async_shared()
    tiles = (sx, sw, places)
    bars = (full, empty, order, added_full, added_empty)
    source = (x, weight, added)
    result = (bias, out, active)
    gl.warp_specialize(
        [
            (_consumer, (0, result, tiles, bars, T, D, F, ROWS, COLUMNS, WHOLE, GROUP, SLOTS)),
            (_consumer, (1, result, tiles, bars, T, D, F, ROWS, COLUMNS, WHOLE, GROUP, SLOTS)),
            (_producer, (source, tiles, bars, T, D, F, ROWS, COLUMNS, WHOLE, GROUP, SLOTS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    place: Tensor | None = None,
    tile: HopperTile | None = None,
    blocks: int = 0,
) -> Tensor:
    """See `linear.eager`.

    Takes the tile for so many rows, and one thread block a multiprocessor, where no others are asked for.
    """
    out = x.new_empty(len(x), len(weight)) if place is None else place
    _launch(x, weight, bias, None, out, None, tile, blocks)
    return out


def add_product_(x: Tensor, rows: Tensor, weight: Tensor, tile: HopperTile | None = None, blocks: int = 0) -> Tensor:
    """See `linear.eager`."""
    _launch(rows, weight, None, x, x, None, tile, blocks)
    return x


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    place: Tensor | None = None,
    tile: HopperTile | None = None,
    blocks: int = 0,
) -> Tensor:
    """See `mlp.eager`."""
    active = x.new_empty(len(x), len(weight)) if place is None else place
    _launch(x, weight, bias, None, None, active, tile, blocks)
    return active


def linear_gelu_keep(
    x: Tensor, weight: Tensor, bias: Tensor, tile: HopperTile | None = None, blocks: int = 0
) -> tuple[Tensor, Tensor]:
    """See `mlp.eager`."""
    wide, active = (x.new_empty(len(x), len(weight)) for _ in range(2))
    _launch(x, weight, bias, None, wide, active, tile, blocks)
    return wide, active


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    out: Tensor | None,
    active: Tensor | None,
    tile: HopperTile | None,
    blocks: int,
) -> None:
    """added: `out` itself, or None. out, active: where the sum and its GELU go, one of them or both."""
    (T, D), F, results = x.shape, len(weight), [y for y in (out, active) if y is not None]
    if weight.shape != (F, D) or any(y.shape != (T, F) for y in results):
        raise ValueError(
            f"a weight {list(weight.shape)} does not take rows {list(x.shape)} to {list(results[0].shape)}"
        )
    if D % 8 or F % 8:
        raise ValueError(f"the copy engine takes columns by eights, got a weight {list(weight.shape)}")
    if T == 0:
        return
    tile = choice.hopper_tile(choice.card(x.device), T, F) if tile is None else tile
    x, weight = hopper.in_reach(x, weight)
    bias = bias if bias is None else hopper.in_reach(bias)[0]
    reached = hopper.in_reach(*results)
    added, out, active = (y if y is None else reached[z] for y, z in ((added, 0), (out, 0), (active, -1)))
    arguments = x, weight, bias, added, out, active, T, D, F, *_cut(tile, F)
    key = x.device, x.dtype, D, F, tile, bias is None, out is None, active is None
    launcher = _launchers.get(key)
    if launcher is None:
        launcher = _launchers[key] = _launcher(arguments, tile)
    tiles_in_all = ceil_div(T, tile.rows) * ceil_div(F, tile.columns)
    launcher((min(tiles_in_all, blocks or multiprocessors(x.device)), 1, 1), arguments)
    for result, at in zip(results, reached):
        if at is not result:
            result.copy_(at)


@cache
def _cut(tile: HopperTile, F: int) -> tuple[int, ...]:
    """The kernel's constants from ROWS on: of slots as many as there is room for beside two tiles of the result."""
    rows, columns = tile
    halves = columns > 64 and columns < F and 0 < F % columns <= columns // 2
    slots = min((SHARED_MEMORY - 2 * 2 * rows * columns) // (2 * 64 * (rows + columns)), SLOTS)
    return rows, columns, F // columns if halves else ceil_div(F, columns), GROUP // rows, slots


def _launcher(arguments: tuple, tile: HopperTile) -> Launcher:
    rows, columns = (Tiles([some, 64], TILE.value) for some in tile)
    tiles = rows, columns, None, rows, rows, rows
    return Launcher(product_kernel, arguments, tiles, num_warps=4, maxnreg=MAX_REGISTERS)


_launchers: dict[tuple, Launcher] = {}
