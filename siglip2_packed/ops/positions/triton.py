"""Antialiased resize of the position table, added to the patches as it is computed: one pass, no intermediate; and the
gradient of the table, one pass too.

Shapes: T patches, N images, G side of the table, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.positions.places import ANTIALIASED, Places
from siglip2_packed.ops.runtime.check import Refused
from siglip2_packed.ops.runtime.launch import ceil_div, launch, next_power_of_2
from siglip2_packed.ops.runtime.once import once_differentiable
from siglip2_packed.ops.runtime.tracing import batched, traced


def add_positions(patches: Tensor, table: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
    """See `positions.eager`; all in one dtype, differentiable once. Rows of no image become zeros, and so does their
    gradient. The gradient of the table is summed in float32, in an order that images without rows do not change.
    """
    if places.mode != ANTIALIASED:
        raise Refused(f"the kernel does not compute {places.mode} positions")
    images, image_of_row = places.on(patches.device)
    if torch.is_grad_enabled():
        return AddPositions.apply(patches, table, images, image_of_row, places.padded)  # type: ignore[no-any-return]
    return _add(patches, table, images, image_of_row)


class AddPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches, table, images, image_of_row, padded):
        ctx.save_for_backward(images, image_of_row)
        ctx.entries, ctx.padded = len(table), padded
        return _add(patches, table, images, image_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        images, image_of_row = ctx.saved_tensors
        of_patches, of_table, *_ = ctx.needs_input_grad
        dpatches = dtable = None
        if of_patches:
            dpatches = grad.masked_fill(image_of_row[:, None] < 0, 0) if ctx.padded else grad
        if of_table:
            gradient = table_gradient_operator if batched(grad) or traced() else table_gradient
            dtable = gradient(grad, images, ctx.entries)
        return dpatches, dtable, None, None, None


def _add(patches: Tensor, table: Tensor, images: Tensor, image_of_row: Tensor) -> Tensor:
    T, D = patches.shape
    patches, table = patches.contiguous(), table.contiguous()
    out = torch.empty_like(patches)
    if T:
        launch(
            add_positions_kernel,
            (T, 1, 1),
            (patches, out, table, images, image_of_row),
            (),
            (int(table.shape[0] ** 0.5), D, next_power_of_2(D)),
            num_warps=2 if D > 512 else 1,
        )
    return out


def table_gradient(grad: Tensor, images: Tensor, entries: int) -> Tensor:
    """`[G·G, D]` in the dtype of grad `[T, D]`; of images `[N, 4]` see `Places.on`, of entries there are G·G."""
    D, grad = grad.shape[1], grad.contiguous()
    out = torch.empty((entries, D), dtype=grad.dtype, device=grad.device)
    columns = min(128, next_power_of_2(D))
    launch(
        table_gradient_kernel,
        (entries, ceil_div(D, columns), 1),
        (grad, out, images),
        (len(images),),
        (int(entries**0.5), D, columns, 4, 4),
        num_warps=2,
    )
    return out


@torch.library.custom_op("siglip2_packed::position_table_gradient", mutates_args=())
def table_gradient_operator(grad: Tensor, images: Tensor, entries: int) -> Tensor:
    return table_gradient(grad, images, entries)


@table_gradient_operator.register_fake
def _(grad, images, entries):
    return grad.new_empty((entries, grad.shape[1]))


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
    place = row - tl.load(images + 4 * image)
    h = tl.load(images + 4 * image + 2)
    w = tl.load(images + 4 * image + 3)
    y_first, y_last, y_centre, y_reach, y_total = _taps(place // w % h, h, SIDE)
    x_first, x_last, x_centre, x_reach, x_total = _taps(place % w, w, SIDE)
    position = tl.zeros([COLUMNS], tl.float32)
    for j in range(x_first, x_last):
        resized = tl.zeros([COLUMNS], tl.float32)
        for i in range(y_first, y_last):
            entry = tl.load(table + (i * SIDE + j) * D + columns, mask=mask, other=0.0).to(tl.float32)
            resized += _weight(i, h, y_centre, y_reach, y_total) * entry
        position += _weight(j, w, x_centre, x_reach, x_total) * resized
    patch = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, (patch + position.to(dtype).to(tl.float32)).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["N"])
def table_gradient_kernel(
    grad,
    out,
    images,
    N,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    IMAGES: tl.constexpr,
    TAPS: tl.constexpr,
):
    """A block of columns of one table entry: all rows that cover it, TAPS at a time of each of IMAGES images."""
    entry = tl.program_id(0)
    i, j = entry // SIDE, entry % SIDE
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lanes = tl.arange(0, IMAGES * TAPS)
    total = tl.zeros([IMAGES * TAPS, COLUMNS], tl.float32)
    for n in range(0, N, IMAGES):
        image = n + lanes // TAPS
        first = tl.load(images + 4 * image, mask=image < N, other=0)
        t = tl.load(images + 4 * image + 1, mask=image < N, other=0)
        h = tl.maximum(tl.load(images + 4 * image + 2, mask=image < N, other=1), 1)
        w = tl.maximum(tl.load(images + 4 * image + 3, mask=image < N, other=1), 1)
        y_first, y_last = _within(2 * tl.maximum(h, SIDE), (2 * i + 1) * h, SIDE, h)
        x_first, x_last = _within(2 * tl.maximum(w, SIDE), (2 * j + 1) * w, SIDE, w)
        height, width = y_last - y_first, x_last - x_first
        taps = t * height * width
        for start in range(0, tl.max(taps, 0), TAPS):
            tap = start + lanes % TAPS
            line = ((tap + 0.5) * (1.0 / width)).to(tl.int32)  # tap // width
            frame = ((line + 0.5) * (1.0 / height)).to(tl.int32)  # line // height
            y = y_first + line - frame * height
            x = x_first + tap - line * width
            _, _, y_centre, y_reach, y_total = _taps(y, h, SIDE)
            _, _, x_centre, x_reach, x_total = _taps(x, w, SIDE)
            weight = _weight(i, h, y_centre, y_reach, y_total) * _weight(j, w, x_centre, x_reach, x_total)
            row = first + (frame * h + y) * w + x
            at = row.to(tl.int64)[:, None] * D + columns[None, :]
            mask = (tap < taps)[:, None] & (columns < D)[None, :]
            total += weight[:, None] * tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + entry * D + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < D)


# Of a side, in units of 1 / (2 · target) of an entry, everything is an integer: entry i has its middle at
# (2i + 1) · target, and index y of target at (2y + 1) · SIDE.


@triton.jit
def _taps(index, target, SIDE: tl.constexpr):
    """First and last table entry that `index` of `target` covers, and what `_weight` takes: centre, reach, sum."""
    centre = (2 * index + 1) * SIDE
    reach = 2 * tl.maximum(target, SIDE)
    first, last = _within(reach, centre, target, SIDE)
    middle = tl.floor((centre + target) * (0.5 / target)).to(tl.int32)  # the first entry beyond the centre
    squares = 2 * middle * middle - first * first - last * last
    total = (last - first) * reach + (first + last - 2 * middle) * centre + squares * target
    return first, last, centre, reach, total


@triton.jit
def _within(reach, centre, step, count):
    """First and last of `count` points, at step, 3 · step, ..., that lie nearer to `centre` than `reach`.

    Integers are divided slowly; so a point at `reach` itself, whose weight is zero, may be among them.
    """
    first = tl.floor((centre - reach + step) * (0.5 / step)).to(tl.int32)
    last = tl.ceil((centre + reach - step) * (0.5 / step)).to(tl.int32)
    return tl.maximum(first, 0), tl.minimum(last, count)


@triton.jit
def _weight(i, target, centre, reach, total):
    """The triangle filter of torch's and Pillow's antialiased bilinear resize, at the middle of entry i, normalised."""
    return (reach - tl.abs((2 * i + 1) * target - centre)).to(tl.float32) / total.to(tl.float32)
