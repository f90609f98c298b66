"""All images of a batch resized and cut in three launches: the weights of all sides; of each image the side that comes
first, to memory between; the other, to patches.

An image is read where its decoder left it, turned by the strides with which it is read.

Shapes: N images, T patches, P patch_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.patches.pillow import PRECISION, SUPPORTS, height_first, taps
from siglip2_packed.ops.runtime.launch import ceil_div, launch
from siglip2_packed.ops.runtime.transfer import to_device

ROWS, COLUMNS, WEIGHTS = 16, 64, 128
FIRST, SECOND, COLUMNS_OF_TABLE = tl.constexpr(6), tl.constexpr(13), tl.constexpr(20)
"""Where a row of the table has its sides: what they are, and where their weights begin."""
EIGHTH = tl.constexpr(0.125)
BITS, ONE, HALF = tl.constexpr(PRECISION), tl.constexpr(1.0 * (1 << PRECISION)), tl.constexpr(1 << PRECISION - 1)


class Side(NamedTuple):
    """Height or width of an image, upright."""

    stride: int
    """Bytes from a pixel to the next."""
    length: int
    resized: int
    taps: int
    begin: int
    extent: int
    """Of the picture, in eighths of a pixel: it may be a part of the file's, at an eighth of its size."""


def side(stride: int, length: int, resized: int, begin: float, end: float, mode: str) -> Side:
    eighths = 8 * begin, 8 * (end - begin)
    assert all(x == int(x) for x in eighths), f"a box is in eighths of a pixel, got {begin} to {end}"
    return Side(stride, length, resized, taps(end - begin, resized, mode), *map(int, eighths))


def cut(
    images: list[Tensor],
    turns: list,
    boxes: list,
    grids: list[tuple[int, int]],
    patch_size: int,
    mode: str,
    order: str,
) -> Tensor:
    """See `patches.eager`."""
    device, p = images[0].device, patch_size
    table, pixels, weights, patches = [], 0, 0, 0
    columns = lines = rows = 0  # at most, of the first side when resized, the second before and after
    for image, turn, box, (h, w) in zip(images, turns, boxes, grids):
        corner, plane, down, across = place(image, turn)
        left, top, right, bottom = box or (0, 0, across[1], down[1])
        height, width = side(*down, h * p, top, bottom, mode), side(*across, w * p, left, right, mode)
        by_height = height_first(order, (height.length, height.resized), (width.length, width.resized))
        first, second = (height, width) if by_height else (width, height)
        starts = weights, weights + (1 + first.taps) * first.resized
        table.append((corner, plane, pixels, patches, w, by_height, *first, starts[0], *second, starts[1]))
        pixels += 3 * second.length * first.resized
        weights = starts[1] + (1 + second.taps) * second.resized
        patches += h * w
        columns, lines, rows = max(columns, first.resized), max(lines, second.length), max(rows, second.resized)
    about = to_device(torch.tensor(table, dtype=torch.int64, device="cpu"), device)  # [N, 20]
    between = torch.empty(pixels, dtype=torch.uint8, device=device)  # of each image [second.length, 3, first.resized]
    filters = torch.empty(weights, dtype=torch.int32, device=device)  # of each side [1 + taps, resized]
    out = torch.empty(patches, p * p * 3, dtype=torch.uint8, device=device)

    all_sides = ceil_div(max(columns, rows), WEIGHTS), 2, len(images)
    launch(weights_kernel, all_sides, (about, filters), (), (WEIGHTS, SUPPORTS[mode]), enable_fp_fusion=False)
    across, tile = (ceil_div(columns, COLUMNS), len(images)), (ROWS, COLUMNS)
    launch(first_kernel, (ceil_div(3 * lines, ROWS), *across), (about, filters, between), (), tile)
    launch(second_kernel, (ceil_div(3 * rows, ROWS), *across), (about, filters, between, out), (), (*tile, p))
    return out


def place(image: Tensor, turn) -> tuple[int, int, tuple[int, int], tuple[int, int]]:
    """Where its upper left corner is when it is upright; from there to the next plane; (to the next, how many) of its
    rows and of its columns."""
    plane, down, across = image.stride()
    height, width = image.shape[1:]
    if turn.sideways:
        down, across, height, width = across, down, width, height
    corner = image.data_ptr()
    if turn.down:
        corner, down = corner + (height - 1) * down, -down
    if turn.across:
        corner, across = corner + (width - 1) * across, -across
    return corner, plane, (down, height), (across, width)


@triton.jit
def weight(x, SUPPORT: tl.constexpr):
    """The filter in float64, bilinear or bicubic with a = -0.5."""
    x = tl.abs(x)
    if SUPPORT == 1:
        return tl.maximum(1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def weights_kernel(table, filters, WEIGHTS: tl.constexpr, SUPPORT: tl.constexpr):
    """`eager.filters` of a side, operation by operation: a fused one would round otherwise. `[1 + taps, resized]`."""
    side = table + tl.program_id(2) * COLUMNS_OF_TABLE + tl.where(tl.program_id(1) == 0, FIRST, SECOND)
    length, resized = tl.load(side + 1).to(tl.int32), tl.load(side + 2).to(tl.int32)
    taps, to = tl.load(side + 3).to(tl.int32), filters + tl.load(side + 6)
    begin, extent = tl.load(side + 4).to(tl.float64) * EIGHTH, tl.load(side + 5).to(tl.float64) * EIGHTH
    at = tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)
    inside = at < resized
    ratio = extent / resized.to(tl.float64)
    stretched = tl.maximum(ratio, 1.0)
    support, shrink = SUPPORT * stretched, 1.0 / stretched
    middle = (at.to(tl.float64) + 0.5) * ratio + begin
    first = tl.maximum((middle - support + 0.5).to(tl.int32), 0)
    end = tl.minimum((middle + support + 0.5).to(tl.int32), length)
    tl.store(to + at, first, mask=inside)
    total = tl.zeros([WEIGHTS], tl.float64)
    for k in range(taps):
        w = weight(((first + k).to(tl.float64) - middle + 0.5) * shrink, SUPPORT)
        total += tl.where(first + k < end, w, 0.0)
    total = tl.where(total == 0.0, 1.0, total)
    for k in range(taps):
        w = weight(((first + k).to(tl.float64) - middle + 0.5) * shrink, SUPPORT)
        scaled = tl.where(first + k < end, w, 0.0) / total * ONE
        rounded = (scaled + tl.where(scaled < 0.0, -0.5, 0.5)).to(tl.int32)
        tl.store(to + (1 + k) * resized + at, rounded, mask=inside)


@triton.jit
def levels(summed):
    """Sums of weighted levels -> levels."""
    return tl.minimum(tl.maximum((summed + HALF) >> BITS, 0), 255).to(tl.uint8)


@triton.jit
def first_kernel(table, filters, between, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`[lines, length]` of three planes -> `[lines, 3, resized]`, of an image."""
    about = table + tl.program_id(2) * COLUMNS_OF_TABLE
    source, plane = tl.load(about).to(tl.pointer_type(tl.uint8)), tl.load(about + 1)
    stride, length = tl.load(about + FIRST), tl.load(about + FIRST + 1)
    resized, taps = tl.load(about + FIRST + 2), tl.load(about + FIRST + 3).to(tl.int32)
    weights = filters + tl.load(about + FIRST + 6)
    down, lines = tl.load(about + SECOND), tl.load(about + SECOND + 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (line, plane)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < 3 * lines)[:, None] & (column < resized)[None, :]
    busy = (tl.program_id(0) * ROWS < 3 * lines) & (tl.program_id(1) * COLUMNS < resized)
    first = tl.load(weights + column, mask=column < resized, other=0)
    line = source + row % 3 * plane + row // 3 * down
    summed = tl.zeros([ROWS, COLUMNS], tl.int32)
    for k in tl.range(0, tl.where(busy, taps, 0), loop_unroll_factor=2):
        w = tl.load(weights + (1 + k) * resized + column, mask=column < resized, other=0)  # [COLUMNS]
        x = first + k
        pixels = tl.load(line[:, None] + (x * stride)[None, :], mask=inside & (x < length)[None, :], other=0)
        summed += pixels.to(tl.int32) * w[None, :]
    to = tl.load(about + 2) + row[:, None] * resized + column[None, :]
    tl.store(between + to, levels(summed), mask=inside)


@triton.jit
def second_kernel(table, filters, between, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr):
    """`[length, 3, columns]` -> `[resized, 3, columns]`, as patches `[h·w, (p, p, 3)]`, of an image."""
    about = table + tl.program_id(2) * COLUMNS_OF_TABLE
    columns, length = tl.multiple_of(tl.load(about + FIRST + 2), P & -P), tl.load(about + SECOND + 1)
    resized, taps = tl.load(about + SECOND + 2), tl.load(about + SECOND + 3).to(tl.int32)
    weights = filters + tl.load(about + SECOND + 6)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (place, plane)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = row < 3 * resized
    inside = within[:, None] & (column < columns)[None, :]
    busy = (tl.program_id(0) * ROWS < 3 * resized) & (tl.program_id(1) * COLUMNS < columns)
    place, plane = row // 3, row % 3
    first = tl.load(weights + place, mask=within, other=0)
    line = between + tl.multiple_of(tl.load(about + 2), P & -P) + plane * columns
    summed = tl.zeros([ROWS, COLUMNS], tl.int32)
    for k in tl.range(0, tl.where(busy, taps, 0), loop_unroll_factor=2):
        w = tl.load(weights + (1 + k) * resized + place, mask=within, other=0)  # [ROWS]
        y = first + k
        from_ = (line + y * 3 * columns)[:, None] + column[None, :]
        pixels = tl.load(from_, mask=inside & (y < length)[:, None], other=0)
        summed += pixels.to(tl.int32) * w[:, None]
    by_height = tl.load(about + 5) != 0  # then what was resized second are the columns of the upright image
    y, x = place[:, None], column[None, :]
    y, x = tl.where(by_height, x, y), tl.where(by_height, y, x)
    patch = tl.load(about + 3) + y // P * tl.load(about + 4) + x // P
    to = out + patch * (P * P * 3) + (y % P * P + x % P) * 3 + plane[:, None]
    tl.store(to, levels(summed), mask=inside)
