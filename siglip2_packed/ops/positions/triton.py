"""Antialiased resize of the position table, added to the patches as it is computed: one pass, no intermediate.

Shapes: T patches, N images, G side of the table, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.positions.places import Places
from siglip2_packed.ops.runtime.launch import device_of, launch, next_power_of_2


def add_positions(patches: Tensor, table: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
    """See `positions.eager`; without gradients, all in one dtype. Rows without an image become zeros."""
    T, D = patches.shape
    patches, table = patches.contiguous(), table.contiguous()
    out = torch.empty_like(patches)
    if T:
        images, image_of_row = places.on(patches.device)
        with device_of(patches):
            launch(
                add_positions_kernel,
                (T, 1, 1),
                (patches, out, table, images, image_of_row),
                (),
                (int(table.shape[0] ** 0.5), D, next_power_of_2(D)),
                num_warps=2 if D > 512 else 1,
            )
    return out


@triton.jit
def add_positions_kernel(
    x, out, table, images, image_of_row, SIDE: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr
):
    """One patch: the table's columns that its column covers, of each the rows that its row covers."""
    row = tl.program_id(0)
    image = tl.load(image_of_row + row)
    columns = tl.arange(0, COLUMNS)
    mask = columns < D
    x += row.to(tl.int64) * D + columns
    out += row.to(tl.int64) * D + columns
    dtype = x.dtype.element_ty
    if image < 0:
        tl.store(out, tl.zeros([COLUMNS], dtype), mask=mask)
        return
    place = row - tl.load(images + 3 * image)
    h = tl.load(images + 3 * image + 1)
    w = tl.load(images + 3 * image + 2)
    y_first, y_last, y_centre, y_reach, y_total = _taps(place // w % h, h, SIDE)
    x_first, x_last, x_centre, x_reach, x_total = _taps(place % w, w, SIDE)
    position = tl.zeros([COLUMNS], tl.float32)
    for j in range(x_first, x_last):
        resized = tl.zeros([COLUMNS], tl.float32)
        for i in range(y_first, y_last):
            entry = tl.load(table + (i * SIDE + j) * D + columns, mask=mask, other=0.0).to(tl.float32)
            resized += _weight(i, h, y_centre, y_reach) / y_total * entry
        position += _weight(j, w, x_centre, x_reach) / x_total * resized
    patch = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, (patch + position.to(dtype).to(tl.float32)).to(dtype), mask=mask)


@triton.jit
def _taps(index, target, SIDE: tl.constexpr):
    """First and last table entry that `index` of `target` covers, and what `_weight` takes: centre, reach, sum.

    In units of 1 / (2 · target) of an entry everything is an integer: entry i has its middle at (2i + 1) · target.
    """
    centre = (2 * index + 1) * SIDE
    reach = 2 * tl.maximum(target, SIDE)
    first = (tl.maximum(centre - reach - target, -2 * target) + 2 * target) // (2 * target)
    last = tl.minimum((centre + reach + target - 1) // (2 * target), SIDE)
    total = 0.0
    for i in range(first, last):
        total += _weight(i, target, centre, reach)
    return first, last, centre, reach, total


@triton.jit
def _weight(i, target, centre, reach):
    """The triangle filter of torch's and Pillow's antialiased bilinear resize, at the middle of entry i."""
    return 1.0 - tl.abs((2 * i + 1) * target - centre) / reach.to(tl.float32)
