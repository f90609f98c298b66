"""LayerNorm in Triton, together with the element-wise work around it: residual add, bias, recomputation in backward.

Rows are read once, in float32, whatever the dtype; the time is that of reading and writing the tensors.

Shapes: T rows, D columns in blocks of W, G programs of a backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.triton import rows
from siglip2_packed.ops.triton.arguments import device_of, launch, multiprocessors
from siglip2_packed.ops.triton.columns import fold


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x `[T, D]`; weight, bias `[D]`. Returns `[T, D]` in x's dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, weight, bias, eps, out)
    return out


def late_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, waiting: Tensor | None, late: Tensor
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + (waiting + late), and waiting + late.

    Args:
        x: `[T, D]`.
        waiting: `[D]` in float32, or None.
        late: `[D]`.

    Returns:
        `[T, D]` in x's dtype; `[D]` in float32.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.shape[0] == 0:
        return out, late.to(torch.float32, copy=True) if waiting is None else waiting + late
    total = torch.empty(late.shape, dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, eps, out, add=late, carry=waiting, total=total)
    return out, total


def add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + update, and x + update + shift. x, update `[T, D]`; weight, bias, shift `[D]`."""
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch(x, weight, bias, eps, out, update=update, add=shift, total=total)
    return out, total


def layer_norm_backward_(
    grad: Tensor,
    residual: Tensor,
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of out = LayerNorm(h), h = x + update (or x): grad becomes dh = residual + what flows through the norm.

    Args:
        grad: `[T, D]`, contiguous, of out; overwritten.
        residual: `[T, D]`, the gradient that reaches h past the norm.
        place: `[T, D]`, contiguous, for out, a new tensor when left out; may be update, whose rows are read first.

    Returns:
        out `[T, D]` once more; `[2, D]`, the gradients of weight and bias, in x's dtype; with an update `[4, D]`: also
        the column sums of dh and of residual, the gradients of what was added to h and to what follows it.
    """
    assert grad.is_contiguous()
    assert place is None or place.is_contiguous()
    T, D = x.shape
    residual, x, weight, bias = (y.contiguous() for y in (residual, x, weight, bias))
    out = torch.empty_like(x) if place is None else place
    update = None if update is None else update.contiguous()
    programs = min(max(1, T), 4 * multiprocessors(x.device))
    width, warps = _cut_for_training(D)
    stages = 3 if D * x.element_size() <= 6144 else 1  # rows under way take twelve times that of shared memory
    sums = torch.empty((programs, 2 if update is None else 4, D), dtype=torch.float32, device=x.device)
    with device_of(x):
        launch(
            backward_kernel,
            (programs, 1, 1),
            (grad, residual, x, x if update is None else update, weight, bias, out, sums),
            (T, float(eps)),
            (D, width, update is not None, stages),
            num_warps=warps,
        )
    return out, fold(sums.flatten(1), x.dtype).view(-1, D)


# The operators, for whom wants to see them; the functions are called without their cost, which is that of a launch.
layer_norm_op = torch.library.custom_op("siglip2_packed::layer_norm", layer_norm, mutates_args=())
late_layer_norm_op = torch.library.custom_op("siglip2_packed::late_layer_norm", late_layer_norm, mutates_args=())
add_layer_norm_op = torch.library.custom_op("siglip2_packed::add_layer_norm", add_layer_norm, mutates_args=())


@torch.library.custom_op("siglip2_packed::layer_norm_backward_", mutates_args=["grad"])
def backward_op(
    grad: Tensor, residual: Tensor, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return layer_norm_backward_(grad, residual, x, update, weight, bias, eps)


@layer_norm_op.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape)


@late_layer_norm_op.register_fake
def _(x, weight, bias, eps, waiting, late):
    return x.new_empty(x.shape), late.new_empty(late.shape, dtype=torch.float32)


@add_layer_norm_op.register_fake
def _(x, update, weight, bias, eps, shift):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@backward_op.register_fake
def _(grad, residual, x, update, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty((2 if update is None else 4, x.shape[1]))


def _cut_for_training(D: int) -> tuple[int, int]:
    """One for forward and backward, where the forward's output is made again: to the bit, as sums go the same way."""
    return rows.cut(D, at_once=4, most=20)


def _launch(x, weight, bias, eps, out, update=None, add=None, carry=None, total=None):
    T, D = x.shape
    if T == 0:
        return
    x = x.contiguous()
    tensors = [x if y is None else y.contiguous() for y in (x, update, add, carry, weight, bias, out, total)]
    inference = add is not None and update is None
    width, warps = rows.cut(D, at_once=8, most=36) if inference else _cut_for_training(D)
    with device_of(x):
        launch(
            forward_kernel,
            (T, 1, 1),
            tuple(tensors),
            (float(eps),),
            (D, width, update is not None, add is not None, carry is not None),
            num_warps=warps,
        )


@triton.jit
def forward_kernel(
    x,
    update,
    add,
    carry,
    weight,
    bias,
    out,
    total,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    UPDATE: tl.constexpr,
    ADD: tl.constexpr,
    CARRY: tl.constexpr,
):
    """out = LayerNorm(h) of one row.

    UPDATE: h = x + update, and total = h + add, rows both. Else, with ADD: h = x + total, total = carry + add.
    """
    row = tl.program_id(0).to(tl.int64) * D
    h = rows.read(x + row, D, W)
    if ADD:
        a = rows.read(add, D, W)
        if CARRY:
            a = rows.add(a, rows.read(carry, D, W))
        if UPDATE:
            h = rows.add(h, rows.read(update + row, D, W))
            rows.write(total + row, rows.add(h, a), D, W)
            h = rows.rounded(h, x.dtype.element_ty)
        else:
            h = rows.add(h, a)
            if row == 0:
                rows.write(total, a, D, W)
    normed, _ = rows.normalise(h, eps, D, W)
    scaled = rows.multiply(normed, rows.read(weight, D, W))
    rows.write(out + row, rows.add(scaled, rows.read(bias, D, W)), D, W)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    grad,
    residual,
    x,
    update,
    weight,
    bias,
    out,
    sums,
    T,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    UPDATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program takes every G-th row, the next ones under way. dh overwrites grad, column sums stay in registers:
    of grad * normed, grad, and with an update of dh and residual.
    """
    dweight, dbias = rows.zeros(D, W), rows.zeros(D, W)
    dh_sum, residual_sum = rows.zeros(D, W), rows.zeros(D, W)
    for number in tl.range(tl.program_id(0), T, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(number, tl.int64) * D
        h = rows.read(x + row, D, W)
        g = rows.read(grad + row, D, W)
        r = rows.read(residual + row, D, W)
        if UPDATE:
            h = rows.rounded(rows.add(h, rows.read(update + row, D, W)), x.dtype.element_ty)
        normed, scale = rows.normalise(h, eps, D, W)
        w = rows.read(weight, D, W)
        rows.write(out + row, rows.add(rows.multiply(normed, w), rows.read(bias, D, W)), D, W)
        dweight = rows.add(dweight, rows.multiply(g, normed))
        dbias = rows.add(dbias, g)
        # dh = residual + scale * (g w - mean(g w) - normed * mean(g w normed))
        g = rows.multiply(g, w)
        mean, along = rows.total(g) / D, rows.total(rows.multiply(g, normed)) / D
        g = rows.add(rows.shifted(g, -mean), rows.scaled(normed, -along))
        dh = rows.add(r, rows.scaled(g, scale))
        rows.write(grad + row, dh, D, W)
        if UPDATE:
            dh_sum = rows.add(dh_sum, dh)
            residual_sum = rows.add(residual_sum, r)
    sums += tl.program_id(0) * (4 * D if UPDATE else 2 * D)
    rows.write(sums, dweight, D, W)
    rows.write(sums + D, dbias, D, W)
    if UPDATE:
        rows.write(sums + 2 * D, dh_sum, D, W)
        rows.write(sums + 3 * D, residual_sum, D, W)
