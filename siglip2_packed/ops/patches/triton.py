"""All images of a batch resized and cut in two launches: their widths, to memory between; their heights, to patches.

An image is read where its decoder left it, turned by the strides with which it is read.

Shapes: N images, T patches, P patch_dim.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.runtime.launch import ceil_div, launch
from siglip2_packed.ops.runtime.transfer import to_device

ROWS, COLUMNS = 16, 64
SUPPORTS = {"bilinear": 1, "bicubic": 2}


def cut(images: list[Tensor], turns: list, grids: list[tuple[int, int]], patch_size: int, mode: str) -> Tensor:
    """See `patches.eager`."""
    device, p = images[0].device, patch_size
    heights, widths = zip(*(image.shape[1:][:: -1 if turn.sideways else 1] for image, turn in zip(images, turns)))
    between = [0, *itertools.accumulate(3 * height * w * p for height, (_, w) in zip(heights, grids))]
    patches = [0, *itertools.accumulate(h * w for h, w in grids)]
    rows = zip(map(place, images, turns), heights, widths, grids, between, patches)
    table = [(*where, height, width, h * p, w * p, at, first) for where, height, width, (h, w), at, first in rows]
    about = to_device(torch.tensor(table, dtype=torch.int64, device="cpu"), device)  # [N, 10]
    levels = torch.empty(between[-1], dtype=torch.uint8, device=device)
    out = torch.empty(patches[-1], p * p * 3, dtype=torch.uint8, device=device)
    columns = ceil_div(max(w for _, w in grids) * p, COLUMNS)
    options = ROWS, COLUMNS, SUPPORTS[mode], p
    launch(across_kernel, (ceil_div(3 * max(heights), ROWS), columns, len(images)), (about, levels, out), (), options)
    down = ceil_div(3 * max(h for h, _ in grids) * p, ROWS), columns, len(images)
    launch(down_kernel, down, (about, levels, out), (), options)
    return out


def place(image: Tensor, turn) -> tuple[int, int, int, int]:
    """Of its upper left corner when it is upright; from there to the next plane, row and column."""
    plane, down, across = image.stride()
    height, width = image.shape[1:]
    if turn.sideways:
        down, across, height, width = across, down, width, height
    corner = image.data_ptr()
    if turn.down:
        corner, down = corner + (height - 1) * down, -down
    if turn.across:
        corner, across = corner + (width - 1) * across, -across
    return corner, plane, down, across


@triton.jit
def span(at, length, resized, SUPPORT: tl.constexpr):
    """Of places in a resized line: the middle of each among the `length` pixels, the first and the end of those that
    count, and the filter's scale."""
    ratio = length.to(tl.float32) / resized.to(tl.float32)
    scale = tl.maximum(ratio, 1.0)
    middle = (at.to(tl.float32) + 0.5) * ratio
    first = tl.maximum((middle - SUPPORT * scale + 0.5).to(tl.int32), 0)
    end = tl.minimum((middle + SUPPORT * scale + 0.5).to(tl.int32), length.to(tl.int32))
    return middle, first, end, scale


@triton.jit
def weight(x, SUPPORT: tl.constexpr):
    """The filter, bilinear or bicubic with a = -0.5."""
    x = tl.abs(x)
    if SUPPORT == 1:
        return tl.maximum(1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def rounded(x):
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0).to(tl.uint8)


@triton.jit
def across_kernel(
    table, levels, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUPPORT: tl.constexpr, P: tl.constexpr
):
    """`[3, height, width]` -> `[3, height, w·p]`, of an image."""
    about = table + tl.program_id(2) * 10
    source = tl.load(about).to(tl.pointer_type(tl.uint8))
    plane, down, across = tl.load(about + 1), tl.load(about + 2), tl.load(about + 3)
    height, width, resized = tl.load(about + 4), tl.load(about + 5), tl.load(about + 7)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of three planes
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < 3 * height)[:, None] & (column < resized)[None, :]
    middle, first, end, scale = span(column, width, resized, SUPPORT)
    line = source + row // height * plane + row % height * down
    total = tl.zeros([COLUMNS], tl.float32)
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)  # [ROWS, COLUMNS]
    busy = (tl.program_id(0) * ROWS < 3 * height) & (tl.program_id(1) * COLUMNS < resized)
    for k in range(tl.where(busy, tl.ceil(2 * SUPPORT * scale).to(tl.int32) + 1, 0)):
        x = first + k
        w = tl.where(x < end, weight((x - middle + 0.5) / scale, SUPPORT), 0.0)
        pixels = tl.load(line[:, None] + (x * across)[None, :], mask=inside & (x < end)[None, :], other=0)
        summed += pixels.to(tl.float32) * w[None, :]
        total += w
    at = tl.load(about + 8) + row[:, None] * resized + column[None, :]
    tl.store(levels + at, rounded(summed / total[None, :]), mask=inside)


@triton.jit
def down_kernel(table, levels, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUPPORT: tl.constexpr, P: tl.constexpr):
    """`[3, height, w·p]` -> `[h·w, (p, p, 3)]`, of an image."""
    about = table + tl.program_id(2) * 10
    height, resized, width = tl.load(about + 4), tl.load(about + 6), tl.load(about + 7)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    plane, y = row // resized, row % resized
    inside = (row < 3 * resized)[:, None] & (column < width)[None, :]
    middle, first, end, scale = span(y, height, resized, SUPPORT)
    line = levels + tl.load(about + 8) + plane * height * width
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)  # [ROWS, COLUMNS]
    busy = (tl.program_id(0) * ROWS < 3 * resized) & (tl.program_id(1) * COLUMNS < width)
    for k in range(tl.where(busy, tl.ceil(2 * SUPPORT * scale).to(tl.int32) + 1, 0)):
        place = first + k
        w = tl.where(place < end, weight((place - middle + 0.5) / scale, SUPPORT), 0.0)
        at = line[:, None] + (place * width)[:, None] + column[None, :]
        pixels = tl.load(at, mask=inside & (place < end)[:, None], other=0)
        summed += pixels.to(tl.float32) * w[:, None]
        total += w
    patch = tl.load(about + 9) + (y // P * (width // P))[:, None] + (column // P)[None, :]
    within = (y % P * P)[:, None] + (column % P)[None, :]
    to = out + patch * (P * P * 3) + within * 3 + plane[:, None]
    tl.store(to, rounded(summed / total[:, None]), mask=inside)
