"""Antialiased resize of the position table, added to the patches as it is computed: one pass, no intermediate.

Shapes: T patches, N images, G side of the table, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.triton.arguments import device_of


def add_positions(x: Tensor, table: Tensor, images: Tensor, image_of_row: Tensor) -> Tensor:
    """Every patch plus the position of its place in its image.

    Args:
        x: `[T, D]`.
        table: `[G·G, D]`; resized in float32, then cast to x's dtype, then added.
        images: `[N, 3]` int32: first row, h and w of each image; further frames repeat the first.
        image_of_row: `[T]` int32, contiguous as `images`; rows with a negative number become zeros.

    Returns:
        `[T, D]` in x's dtype.
    """
    T, D = x.shape
    x, table = x.contiguous(), table.contiguous()
    out = torch.empty_like(x)
    if T:
        with device_of(x):
            add_positions_kernel[(T,)](
                x,
                out,
                table,
                images,
                image_of_row,
                SIDE=int(table.shape[0] ** 0.5),
                D=D,
                COLUMNS=triton.next_power_of_2(D),
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
    y_first, y_last, y_centre, y_width, y_total = _taps(place // w % h, h, SIDE)
    x_first, x_last, x_centre, x_width, x_total = _taps(place % w, w, SIDE)
    position = tl.zeros([COLUMNS], tl.float32)
    for j in range(x_first, x_last):
        resized = tl.zeros([COLUMNS], tl.float32)
        for i in range(y_first, y_last):
            entry = tl.load(table + (i * SIDE + j) * D + columns, mask=mask, other=0.0).to(tl.float32)
            resized += _weight(i, y_centre, y_width) / y_total * entry
        position += _weight(j, x_centre, x_width) / x_total * resized
    patch = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, (patch + position.to(dtype).to(tl.float32)).to(dtype), mask=mask)


@triton.jit
def _taps(index, target, SIDE: tl.constexpr):
    """First and last table index that `index` of `target` covers, its centre, half-width, and the sum of weights."""
    scale = SIDE / target.to(tl.float32)
    centre = (index.to(tl.float32) + 0.5) * scale
    width = tl.maximum(scale, 1.0)
    first = tl.maximum(tl.floor(centre - width).to(tl.int32), 0)
    last = tl.minimum(tl.ceil(centre + width).to(tl.int32), SIDE)
    total = 0.0
    for i in range(first, last):
        total += _weight(i, centre, width)
    return first, last, centre, width, total


@triton.jit
def _weight(i, centre, width):
    """The triangle filter of torch's and Pillow's antialiased bilinear resize, at the middle of entry i."""
    return tl.maximum(1.0 - tl.abs(i + 0.5 - centre) / width, 0.0)
