"""LayerNorm in Triton, together with the element-wise work around it: residual add, bias, recomputation in backward.

Rows are read once, in float32, whatever the dtype; the time is that of reading and writing the tensors.

Shapes: T rows, D columns, G programs of a backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.triton.arguments import device_of, launch, multiprocessors, next_power_of_2
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
        out `[T, D]` once more; `[3, D]`: the gradients of weight and bias, and the column sums of dh, in x's dtype.
    """
    assert grad.is_contiguous()
    assert place is None or place.is_contiguous()
    T, D = x.shape
    residual, x, weight, bias = (y.contiguous() for y in (residual, x, weight, bias))
    out = torch.empty_like(x) if place is None else place
    update = None if update is None else update.contiguous()
    programs = min(max(1, T), 4 * multiprocessors(x.device))
    sums = torch.empty((programs, 3, D), dtype=torch.float32, device=x.device)
    with device_of(x):
        launch(
            backward_kernel,
            (programs, 1, 1),
            (grad, residual, x, x if update is None else update, weight, bias, out, sums),
            (T, float(eps)),
            (D, next_power_of_2(D), update is not None),
            num_warps=2 if D > 512 else 1,
        )
    return out, fold(sums.view(programs, 3 * D), x.dtype).view(3, D)


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
    return x.new_empty(x.shape), x.new_empty((3, x.shape[1]))


def _launch(x, weight, bias, eps, out, update=None, add=None, carry=None, total=None):
    T, D = x.shape
    if T == 0:
        return
    x = x.contiguous()
    tensors = [x if y is None else y.contiguous() for y in (x, update, add, carry, weight, bias, out, total)]
    with device_of(x):
        launch(
            forward_kernel,
            (T, 1, 1),
            tuple(tensors),
            (float(eps),),
            (D, next_power_of_2(D), update is not None, add is not None, carry is not None),
            num_warps=2 if D > 512 else 1,
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
    COLUMNS: tl.constexpr,
    UPDATE: tl.constexpr,
    ADD: tl.constexpr,
    CARRY: tl.constexpr,
):
    """out = LayerNorm(h) of one row.

    UPDATE: h = x + update, and total = h + add, rows both. Else, with ADD: h = x + total, total = carry + add.
    """
    row = tl.program_id(0).to(tl.int64) * D
    columns = tl.arange(0, COLUMNS)
    mask = columns < D
    h = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        a = tl.load(add + columns, mask=mask, other=0.0).to(tl.float32)
        if CARRY:
            a += tl.load(carry + columns, mask=mask, other=0.0)
        if UPDATE:
            h += tl.load(update + row + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(total + row + columns, (h + a).to(total.dtype.element_ty), mask=mask)
            h = h.to(x.dtype.element_ty).to(tl.float32)
        else:
            h += a
            if row == 0:
                tl.store(total + columns, a, mask=mask)
    normed, _ = _normalise(h, mask, eps, D)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + columns, (normed * w + b).to(out.dtype.element_ty), mask=mask)


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
    COLUMNS: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """One program takes every G-th row. dh overwrites grad, column sums `[3, D]` stay in registers until the end."""
    columns = tl.arange(0, COLUMNS)
    mask = columns < D
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([COLUMNS], tl.float32)
    dbias = tl.zeros([COLUMNS], tl.float32)
    dx_sum = tl.zeros([COLUMNS], tl.float32)
    for i in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(i, tl.int64) * D
        h = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + row + columns, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(residual + row + columns, mask=mask, other=0.0).to(tl.float32)
        if UPDATE:
            h += tl.load(update + row + columns, mask=mask, other=0.0).to(tl.float32)
            h = h.to(x.dtype.element_ty).to(tl.float32)
        normed, scale = _normalise(h, mask, eps, D)
        tl.store(out + row + columns, (normed * w + b).to(out.dtype.element_ty), mask=mask)
        dweight += g * normed
        dbias += g
        g *= w
        d = r + scale * (g - tl.sum(g, 0) / D - normed * (tl.sum(g * normed, 0) / D))
        dx_sum += d
        tl.store(grad + row + columns, d.to(grad.dtype.element_ty), mask=mask)
    sums += tl.program_id(0) * 3 * D + columns
    tl.store(sums, dweight, mask=mask)
    tl.store(sums + D, dbias, mask=mask)
    tl.store(sums + 2 * D, dx_sum, mask=mask)


@triton.jit
def _normalise(h, mask, eps, D: tl.constexpr):
    """(h - mean) / sqrt(variance + eps), zeros where masked, and 1 / sqrt(variance + eps)."""
    centred = tl.where(mask, h - tl.sum(h, 0) / D, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    return centred * scale, scale
